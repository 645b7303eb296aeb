"""Dynamic sampling (DAPO, arXiv:2503.14476, sec. 3.2): prompts whose responses all score alike teach nothing.

They are dropped, other prompts are answered in their place, and what is left is shared out anew, so that each rank
trains on as many prompts as the others, give or take one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rollout import Rollout, RolloutBatch
from trainers.across_ranks import sum_over_ranks
from trainers.data import Example
from trainers.scoring import Scores

ROUND_SEEDS = 2**32
"""Apart from each other in the engine's seeds: training steps are fewer."""


@dataclass(frozen=True)
class Round:
    """One generation of this rank's: its prompts, the responses and what these scored."""

    examples: Sequence[Example]
    rollouts: RolloutBatch
    scores: Scores


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, and their scores."""

    rollouts: list[Rollout]
    scores: np.ndarray


def round_seed(step: int, number: int) -> int:
    """Of the engine's streams in a step's round; the first one's is the step.

    >>> round_seed(step=3, number=0), round_seed(step=3, number=1) == round_seed(step=4, number=1)
    (3, False)
    """
    return step + ROUND_SEEDS * number


def groups_with_signal(rollouts: RolloutBatch, scores: np.ndarray, n: int) -> list[Group]:
    """This rank's prompts whose responses do not all score alike.

    Args:
        rollouts: of this rank; the n responses of a prompt stand together.
        scores: (batch,) float.
    """
    of_prompts = scores.reshape(-1, n)
    different = of_prompts.max(axis=1, initial=-np.inf) > of_prompts.min(axis=1, initial=np.inf)
    return [
        Group([rollouts[row] for row in range(prompt * n, (prompt + 1) * n)], of_prompts[prompt])
        for prompt in np.flatnonzero(different)
    ]


def count_groups(rounds: Sequence[Round], n: int) -> int:
    """Groups with signal so far, all ranks: a collective."""
    ours = sum(len(groups_with_signal(each.rollouts, each.scores.total, n)) for each in rounds)
    return int(sum_over_ranks(torch.tensor(ours)).item())


def share_out(rounds: Sequence[Round], n: int, wanted: int) -> tuple[list[Group], dict[str, float]]:
    """This rank's part of the groups with signal of all ranks, at most `wanted` together; a collective.

    Groups of earlier rounds come first, within a round those of lower ranks; rank r takes every world_size-th.

    Returns:
        The groups, none where there are fewer than ranks; and the metrics that docs/metrics.md explains.
    """
    ours = [groups_with_signal(each.rollouts, each.scores.total, n) for each in rounds]
    rank, size = dist.get_rank(), dist.get_world_size()
    everyones: list[Any] = [None] * size
    dist.all_gather_object(everyones, ours)
    kept = [group for of_round in zip(*everyones, strict=True) for of_rank in of_round for group in of_rank]
    generated = int(sum_over_ranks(torch.tensor(sum(len(each.examples) for each in rounds))).item())
    trained = kept[:wanted]
    return trained[rank::size], {
        "rollout/kept_groups_fraction": len(kept) / generated,
        "rollout/rounds": len(rounds),
        "rollout/trained_groups": len(trained),
    }


def join(groups: Sequence[Group]) -> tuple[RolloutBatch, np.ndarray]:
    """The groups as one batch, numbered from 0, and its scores; at least one group."""
    rows = [rollout for group in groups for rollout in group.rollouts]
    batch = RolloutBatch(
        prompt_ids=np.concatenate([row.prompt_ids for row in rows]),
        prompt_lengths=np.array([len(row.prompt_ids) for row in rows], np.int32),
        response_ids=np.concatenate([row.response_ids for row in rows]),
        response_lengths=np.array([len(row.response_ids) for row in rows], np.int32),
        logprobs=np.concatenate([row.logprobs for row in rows]),
        finished=np.array([row.finish_reason == "stop" for row in rows]),
        prompt_index=np.repeat(np.arange(len(groups), dtype=np.int32), [len(group.rollouts) for group in groups]),
        version=rows[0].version,
    )
    return batch, np.concatenate([group.scores for group in groups])


def add_rounds(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The rollout/* metrics of a step's rounds: amounts add up, the rest is the first round's.

    >>> first = {"rollout/generated_tokens": 100, "rollout/seconds": 1.0, "rollout/kv_cache_usage": 0.5}
    >>> add_rounds([first, first | {"rollout/seconds": 3.0}])["rollout/generated_tokens_per_s"]
    50.0
    """
    if len(metrics) == 1:
        return metrics[0]
    amounts = ("generated_tokens", "seconds", "sequences", "decode_steps", "preemptions")
    names = [name for amount in amounts if (name := f"rollout/{amount}") in metrics[0]]
    total = {name: sum(of_round[name] for of_round in metrics) for name in names}
    rate = total["rollout/generated_tokens"] / total["rollout/seconds"]
    return metrics[0] | total | {"rollout/generated_tokens_per_s": rate}
