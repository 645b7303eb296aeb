"""The passes without gradient before a step's first update: old log-probs, values and reference log-probs."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from rollout import beat
from trainers.batching import TrainBatch, microbatch_rows, unpack
from trainers.policy import PolicyWithValue, reference_logprobs


@torch.no_grad()
def evaluate(
    batch: TrainBatch,
    policy: PolicyWithValue,
    reference: PreTrainedModel | None,
    temperature: float,
    token_budget: int,
) -> TrainBatch:
    """The batch with what the policy and the reference say about its responses; no collective.

    Run it under the same autocast as the training passes, else the first ratio is not 1.

    Args:
        batch: this rank's.
        policy: before the step's first update, on the batch's device, not wrapped in DDP: ranks may need different
            numbers of micro-batches, and DDP's forward may synchronise.
        reference: frozen, on the same device; None without a KL penalty.
        temperature: of the sampling, divides the logits; 0 (greedy) counts as 1.
        token_budget: tokens of one pass, padding counted; more than in training fits, since nothing is kept.

    Returns:
        The batch, in its order, with `logprobs`, `values` and, with a reference, `ref_logprobs`, each
        (batch, response), zero outside `response_mask`.
    """
    logprobs = batch.engine_logprobs.new_zeros(batch.response_mask.shape, dtype=policy.value_head.weight.dtype)
    values, ref_logprobs = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    for rows in microbatch_rows(batch.lengths, token_budget):
        part = batch.select(rows)
        inputs = (part.input_ids, part.predicts_response, part.targets, temperature)
        output = policy(*inputs, values=True)
        _store(logprobs, rows, output.logprobs, part.response_mask)
        _store(values, rows, output.values, part.response_mask)
        if reference is not None:
            _store(ref_logprobs, rows, reference_logprobs(reference, *inputs), part.response_mask)
        beat()
    return replace(batch, logprobs=logprobs, values=values, ref_logprobs=None if reference is None else ref_logprobs)


def _store(table: torch.Tensor, rows: torch.Tensor, packed: torch.Tensor, mask: torch.Tensor) -> None:
    """Writes the packed (tokens,) values of some rows to their places in a (batch, response) table."""
    table[rows.to(table.device), : mask.shape[1]] = unpack(packed, mask).to(table.dtype)
