"""Dynamic sampling (DAPO, arXiv:2503.14476, sec. 3.2): prompts whose responses all score alike teach nothing.

They are dropped, and other prompts are answered in their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout import RolloutBatch
from trainers.across_ranks import sum_over_ranks
from trainers.balance import Group, gather, groups_of
from trainers.data import Example
from trainers.scoring import Scores

ROUND_SEEDS = 2**32
"""Apart from each other in the engine's seeds: training steps are fewer."""
AMOUNTS = (
    *("generated_tokens", "seconds", "sequences", "decode_steps", "preemptions"),
    *("observation_tokens", "environment_seconds", "environment_failed"),
)
"""Of rollout/*: these add up over a step's rounds."""


@dataclass(frozen=True)
class Round:
    """One generation of this rank's: its prompts, the responses and what these scored."""

    examples: Sequence[Example]
    rollouts: RolloutBatch
    scores: Scores


def round_seed(step: int, number: int) -> int:
    """Of the engine's streams in a step's round; the first one's is the step.

    >>> round_seed(step=3, number=0), round_seed(step=3, number=1) == round_seed(step=4, number=1)
    (3, False)
    """
    return step + ROUND_SEEDS * number


def groups_with_signal(rollouts: RolloutBatch, scores: np.ndarray) -> list[Group]:
    """This rank's prompts whose responses do not all score alike.

    Args:
        rollouts: of this rank.
        scores: (batch,) float.
    """
    return [group for group in groups_of(rollouts, scores) if group.scores.max() > group.scores.min()]


def count_groups(rounds: Sequence[Round]) -> int:
    """Groups with signal so far, all ranks: a collective."""
    ours = sum(len(groups_with_signal(each.rollouts, each.scores.total)) for each in rounds)
    return int(sum_over_ranks(torch.tensor(ours)).item())


def kept_groups(rounds: Sequence[Round], wanted: int | None) -> tuple[list[Group], dict[str, float]]:
    """The groups with signal of all ranks, at most `wanted` (None: all of them); a collective.

    Groups of earlier rounds come first, within a round those of lower ranks.

    Returns:
        The groups, the same on all ranks; and the metrics that docs/metrics.md explains.
    """
    kept = [group for each in rounds for group in gather(groups_with_signal(each.rollouts, each.scores.total))]
    generated = int(sum_over_ranks(torch.tensor(sum(len(each.examples) for each in rounds))).item())
    trained = kept[:wanted]
    return trained, {
        "rollout/kept_groups_fraction": len(kept) / max(generated, 1),
        "rollout/rounds": len(rounds),
        "rollout/trained_groups": len(trained),
    }


def add_rounds(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The rollout/* metrics of a step's rounds: amounts add up, the rest is the first round's.

    >>> first = {"rollout/generated_tokens": 100, "rollout/seconds": 1.0, "rollout/kv_cache_usage": 0.5}
    >>> add_rounds([first, first | {"rollout/seconds": 3.0}])["rollout/generated_tokens_per_s"]
    50.0
    """
    if len(metrics) == 1:
        return metrics[0]
    names = [name for amount in AMOUNTS if (name := f"rollout/{amount}") in metrics[0]]
    total = {name: sum(of_round[name] for of_round in metrics) for name in names}
    rate = total["rollout/generated_tokens"] / total["rollout/seconds"]
    return metrics[0] | total | {"rollout/generated_tokens_per_s": rate}
