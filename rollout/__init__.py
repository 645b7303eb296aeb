"""Rollouts for reinforcement-learning jobs that start with torchrun: the public names.

Configuration imports in milliseconds; the engine, and vLLM behind it, only when first asked for.
"""

from typing import TYPE_CHECKING

from rollout.config import RolloutConfig, SamplingConfig
from rollout.types import Prompt, Rollout, RolloutBatch

if TYPE_CHECKING:
    from rollout.agreement import RanksDisagree
    from rollout.balance import partition
    from rollout.engine import RolloutEngine
    from rollout.failure import Watch, beat, watched
    from rollout.throughput import merge_groups, overlap_fraction
    from rollout.trace import merge_traces, write_trace
    from rollout.weights import StaleWeights, SyncReport
    from rollout.world import Machine, World, check_machines, init_world, machines_of_ranks, this_machine

__all__ = [
    "Machine",
    "Prompt",
    "RanksDisagree",
    "Rollout",
    "RolloutBatch",
    "RolloutConfig",
    "RolloutEngine",
    "SamplingConfig",
    "StaleWeights",
    "SyncReport",
    "Watch",
    "World",
    "beat",
    "check_machines",
    "init_world",
    "machines_of_ranks",
    "merge_groups",
    "merge_traces",
    "overlap_fraction",
    "partition",
    "this_machine",
    "watched",
    "write_trace",
]

_LAZY = {
    "Machine": "rollout.world",
    "RanksDisagree": "rollout.agreement",
    "RolloutEngine": "rollout.engine",
    "StaleWeights": "rollout.weights",
    "SyncReport": "rollout.weights",
    "Watch": "rollout.failure",
    "World": "rollout.world",
    "beat": "rollout.failure",
    "check_machines": "rollout.world",
    "init_world": "rollout.world",
    "machines_of_ranks": "rollout.world",
    "merge_groups": "rollout.throughput",
    "merge_traces": "rollout.trace",
    "overlap_fraction": "rollout.throughput",
    "partition": "rollout.balance",
    "this_machine": "rollout.world",
    "watched": "rollout.failure",
    "write_trace": "rollout.trace",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
