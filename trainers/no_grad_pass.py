"""The passes without gradient before a step's first update: old log-probs, values, reference log-probs, as wanted."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from rollout import beat, span
from trainers.batching import TrainBatch, unpack
from trainers.packing import microbatches
from trainers.policy import Policy, reference_logprobs


@torch.no_grad()
def no_grad_pass(
    batch: TrainBatch,
    policy: Policy,
    reference: PreTrainedModel | None,
    temperature: float,
    token_budget: int,
    logprobs: bool = True,
) -> TrainBatch:
    """The batch with what the policy and the reference say about its responses; no collective.

    Run it under the same autocast as the training passes, else the first ratio is not 1.

    Args:
        batch: this rank's.
        policy: before the step's first update, on the batch's device, not wrapped in DDP: ranks may need different
            numbers of micro-batches, and DDP's forward may synchronise.
        reference: frozen, on the same device; None without a KL penalty.
        temperature: of the sampling, divides the logits; 0 (greedy) counts as 1.
        token_budget: tokens of one pass; more than in training fits, since nothing is kept.
        logprobs: False leaves out the policy's log-probs.

    Returns:
        The batch, in its order, with `logprobs`, with a value head `values`, with a reference `ref_logprobs`, each
        (batch, response) float32 or wider, zero outside `response_mask`; what is not wanted stays None.
    """
    found: dict[str, torch.Tensor] = {}
    values = policy.value_head is not None
    if not (logprobs or values or reference is not None):
        return batch
    for rows in microbatches(batch, token_budget, policy.packs):
        part = batch.select(rows)
        if logprobs or values:
            with span("policy", responses=len(part)):
                output = policy(part, temperature, logprobs=logprobs)
            if logprobs:
                _store(found, "logprobs", rows, output.logprobs, part.response_mask, batch)
            if values:
                _store(found, "values", rows, output.values, part.response_mask, batch)
        if reference is not None:
            with span("reference", responses=len(part)):
                packed = reference_logprobs(reference, part, temperature)
            _store(found, "ref_logprobs", rows, packed, part.response_mask, batch)
        beat()
    return replace(batch, **found)


def _store(
    found: dict[str, torch.Tensor],
    name: str,
    rows: torch.Tensor,
    packed: torch.Tensor,
    mask: torch.Tensor,
    batch: TrainBatch,
) -> None:
    """Writes the packed (tokens,) values of some rows to their places in a (batch, response) table."""
    table = found.setdefault(name, packed.new_zeros(batch.response_mask.shape))
    table[rows.to(table.device), : mask.shape[1]] = unpack(packed, mask)
