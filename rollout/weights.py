"""Policy -> engine: copy the weights between two phases of generation, under a version."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class SyncReport:
    """What one weight sync did on this rank.

    Attributes:
        version: of the policy that the engine now holds.
        seconds: from the call to the moment at which the engine may generate again.
        num_bytes: read from the policy.
    """

    version: int
    seconds: float
    num_bytes: int

    def metrics(self) -> dict[str, float]:
        """As logged: sync/seconds, sync/gib_per_s, sync/version."""
        return {
            "sync/seconds": self.seconds,
            "sync/gib_per_s": self.num_bytes / 1024**3 / self.seconds,
            "sync/version": float(self.version),
        }


def sync_policy(core: Any, policy: nn.Module, version: int) -> SyncReport:
    """Copy the policy's parameters into the engine, on the execute thread, behind whatever is queued there.

    The prefix cache is emptied: its blocks were computed with the old weights.

    Args:
        core: `rollout.backend.core.Core`.
        policy: a Hugging Face causal language model of the engine's architecture, plain or in DDP; the same on every
            rank. Any dtype: the engine casts to its own.
        version: to be recorded by every rollout until the next sync.

    Raises:
        ValueError: if the policy lacks a parameter that the engine has.
        RuntimeError: if the prefix cache could not be emptied, because requests are still running.
    """
    start = time.perf_counter()
    num_bytes = core.executor.load_policy_weights(named_weights(policy))
    if not core.scheduler.reset_prefix_cache():
        raise RuntimeError("the prefix cache still holds blocks of running requests: sync between calls of generate")
    return SyncReport(version, time.perf_counter() - start, num_bytes)


def named_weights(policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's parameters under their checkpoint names; tied ones once.

    >>> list(named_weights(nn.Linear(2, 1, bias=False)))[0][0]
    'weight'
    """
    if isinstance(policy, nn.parallel.DistributedDataParallel):
        policy = policy.module
    for name, parameter in policy.named_parameters():
        yield name, parameter.detach()
