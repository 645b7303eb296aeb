"""The passes without gradient before a step's first update: old log-probs, values, reference log-probs, as wanted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from rollout import beat, span
from trainers.batching import TrainBatch, stand_in, unpack
from trainers.lora import without_adapters
from trainers.packing import microbatches
from trainers.policy import Policy
from trainers.sharding import passes, put_away


@torch.no_grad()
def no_grad_pass(
    batch: TrainBatch,
    policy: Policy,
    reference: Policy | None,
    temperature: float,
    token_budget: int,
    logprobs: bool = True,
) -> TrainBatch:
    """The batch with what the policy and the reference say about its responses; a collective if they are sharded.

    Run it under the same autocast as the training passes, else the first ratio is not 1.

    Args:
        batch: this rank's.
        policy: before the step's first update, on the batch's device, not wrapped in DDP: ranks may need different
            numbers of micro-batches, and DDP's forward may synchronise. (Sharded ones make up for it.)
        reference: frozen, on the same device, sharded if the policy is; it counts without its adapters, so that a
            policy can be its own reference. None without a KL penalty.
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
    device = batch.input_ids.device
    with evaluating(policy):  # no dropout: the engine sampled without
        for rows in passes(microbatches(batch, token_budget, policy.packs), policy, device):
            part = stand_in(device) if rows is None else batch.select(rows)
            if logprobs or values:
                with span("policy", responses=len(part)):
                    output = policy(part, temperature, logprobs=logprobs)
                if logprobs:
                    _store(found, "logprobs", rows, output.logprobs, part.response_mask, batch)
                if values:
                    _store(found, "values", rows, output.values, part.response_mask, batch)
            if reference is not None:
                with span("reference", responses=len(part)), without_adapters(reference):
                    output = reference(part, temperature, values=False)
                _store(found, "ref_logprobs", rows, output.logprobs, part.response_mask, batch)
            beat()
    put_away(policy)
    put_away(reference)
    return replace(batch, **found)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode inside; afterwards all of it in the mode that the whole was in.

    >>> layer = nn.Dropout().train()
    >>> with evaluating(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _store(
    found: dict[str, torch.Tensor],
    name: str,
    rows: torch.Tensor | None,
    packed: torch.Tensor,
    mask: torch.Tensor,
    batch: TrainBatch,
) -> None:
    """Writes the packed (tokens,) values of some rows to their places in a (batch, response) table.

    Of a pass for the others' sake (`rows` is None) nothing is kept.
    """
    if rows is None:
        return
    table = found.setdefault(name, packed.new_zeros(batch.response_mask.shape))
    table[rows.to(table.device), : mask.shape[1]] = unpack(packed, mask)
