"""Policy -> engine: copy the weights between two phases of generation, under a version."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rollout.adapters import LoraWeight, Weight, has_adapters, merged_weights, unwrapped, whole


class StaleWeights(RuntimeError):
    """After a sync the engine holds something else than the policy sent."""


@dataclass(frozen=True)
class SyncReport:
    """What one weight sync did on this rank.

    Attributes:
        version: of the policy that the engine now holds.
        seconds: from the call to the moment at which the engine may generate again.
        num_bytes: read from the policy.
        planned: True if the weights were copied by a plan (rollout/backend/sync_plan.py); False if vLLM reloaded them.
    """

    version: int
    seconds: float
    num_bytes: int
    planned: bool

    def metrics(self) -> dict[str, float]:
        """As logged: sync/seconds, sync/gib_per_s, sync/version."""
        return {
            "sync/seconds": self.seconds,
            "sync/gib_per_s": self.num_bytes / 1024**3 / self.seconds,
            "sync/version": float(self.version),
        }


def sync_policy(core: Any, policy: nn.Module, version: int) -> SyncReport:
    """Copy the policy's parameters into the engine, on the execute thread, behind whatever is queued there.

    The prefix cache is emptied: its blocks were computed with the old weights. A few of the engine's layers, others
    each time, are compared with what was sent.

    Args:
        core: `rollout.backend.core.Core`.
        policy: a Hugging Face causal language model of the engine's architecture, plain, in DDP, in FSDP2's shards
            (`fully_shard`) or under adapters of PEFT's LoRA; the same on every rank. Any dtype: the engine casts to
            its own.
        version: to be recorded by every rollout until the next sync.

    Raises:
        ValueError: if the policy lacks a parameter that the engine has.
        StaleWeights: if the engine holds something else afterwards.
        RuntimeError: if the prefix cache could not be emptied, because requests are still running.
    """
    start = time.perf_counter()
    loaded = core.executor.load_policy_weights(dict(named_weights(policy)))
    empty_prefix_cache(core)
    return SyncReport(version, time.perf_counter() - start, loaded.num_bytes, loaded.planned)


def empty_prefix_cache(core: Any) -> None:
    """Forget the KV blocks of earlier prompts.

    Raises:
        RuntimeError: if requests are still running.
    """
    if not core.scheduler.reset_prefix_cache():
        raise RuntimeError("the prefix cache still holds blocks of running requests: wait until generate has returned")


def merged_state(policy: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """What `sync_weights` sends of a policy with adapters, whole and in one dtype: a checkpoint of the merged model.

    Of a sharded policy all ranks take the same of it, together.

    Raises:
        ValueError: if an adapter cannot be merged.
    """
    for name, weight in named_weights(policy):
        yield name, (weight.merged() if isinstance(weight, LoraWeight) else whole(weight)).to(dtype)


def named_weights(policy: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The policy's parameters under their checkpoint names; tied ones once, and adapters merged (when they are read).

    Raises:
        ValueError: if an adapter cannot be merged (rollout/adapters.py).

    >>> list(named_weights(nn.Linear(2, 1, bias=False)))[0][0]
    'weight'
    """
    policy = unwrapped(policy)
    if has_adapters(policy):
        yield from merged_weights(policy)
        return
    for name, parameter in policy.named_parameters():
        # Detaching a sharded one takes as long as copying a small layer: whoever reads its shard does without.
        yield name, parameter if isinstance(parameter, DTensor) else parameter.detach()
