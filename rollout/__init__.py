"""Rollouts for reinforcement-learning jobs that start with torchrun: the public names.

Configuration imports in milliseconds; the engine, and vLLM behind it, only when first asked for.
"""

from typing import TYPE_CHECKING

from rollout.config import RolloutConfig, SamplingConfig
from rollout.types import OnStep, Prompt, Rollout, RolloutBatch

if TYPE_CHECKING:
    from rollout.agreement import RanksDisagree
    from rollout.balance import partition
    from rollout.clocks import seconds_ahead
    from rollout.engine import RolloutEngine
    from rollout.failure import Watch, beat, watched
    from rollout.spans import Recording, record_span, recorded, span
    from rollout.throughput import merge_groups, overlap_fraction
    from rollout.trace import merge_traces, recording_events, write_events, write_trace
    from rollout.turns import (
        CUT,
        Cut,
        Draft,
        Observation,
        Observe,
        advance_drafts,
        generate_turns,
        join_drafts,
        one_by_one,
    )
    from rollout.weights import StaleWeights, SyncReport, merged_state
    from rollout.world import Machine, World, check_machines, init_world, machines_of_ranks, this_machine

__all__ = [
    "CUT",
    "Cut",
    "Draft",
    "Machine",
    "Observation",
    "Observe",
    "OnStep",
    "Prompt",
    "RanksDisagree",
    "Recording",
    "Rollout",
    "RolloutBatch",
    "RolloutConfig",
    "RolloutEngine",
    "SamplingConfig",
    "StaleWeights",
    "SyncReport",
    "Watch",
    "World",
    "advance_drafts",
    "beat",
    "check_machines",
    "generate_turns",
    "init_world",
    "join_drafts",
    "machines_of_ranks",
    "merge_groups",
    "merge_traces",
    "merged_state",
    "one_by_one",
    "overlap_fraction",
    "partition",
    "record_span",
    "recorded",
    "recording_events",
    "seconds_ahead",
    "span",
    "this_machine",
    "watched",
    "write_events",
    "write_trace",
]

_LAZY = {
    "CUT": "rollout.turns",
    "Cut": "rollout.turns",
    "Draft": "rollout.turns",
    "Machine": "rollout.world",
    "Observation": "rollout.turns",
    "Observe": "rollout.turns",
    "RanksDisagree": "rollout.agreement",
    "Recording": "rollout.spans",
    "RolloutEngine": "rollout.engine",
    "StaleWeights": "rollout.weights",
    "SyncReport": "rollout.weights",
    "Watch": "rollout.failure",
    "World": "rollout.world",
    "advance_drafts": "rollout.turns",
    "beat": "rollout.failure",
    "check_machines": "rollout.world",
    "generate_turns": "rollout.turns",
    "init_world": "rollout.world",
    "join_drafts": "rollout.turns",
    "machines_of_ranks": "rollout.world",
    "merge_groups": "rollout.throughput",
    "merge_traces": "rollout.trace",
    "merged_state": "rollout.weights",
    "one_by_one": "rollout.turns",
    "overlap_fraction": "rollout.throughput",
    "partition": "rollout.balance",
    "record_span": "rollout.spans",
    "recorded": "rollout.spans",
    "recording_events": "rollout.trace",
    "seconds_ahead": "rollout.clocks",
    "span": "rollout.spans",
    "this_machine": "rollout.world",
    "watched": "rollout.failure",
    "write_events": "rollout.trace",
    "write_trace": "rollout.trace",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
