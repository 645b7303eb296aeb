"""A step's responses shared out over the ranks, so that each trains on as many tokens as the others.

The ranks of a job train as fast as the one with the most to do. Responses differ in length by a factor of ten and more,
and which rank asked for the long ones is chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from rollout import Rollout, RolloutBatch, partition


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, and their scores; they stay on one rank."""

    rollouts: list[Rollout]
    scores: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Of a packed pass: the prompt once."""
        return len(self.rollouts[0].prompt_ids) + sum(len(rollout.response_ids) for rollout in self.rollouts)


def groups_of(rollouts: RolloutBatch, scores: np.ndarray) -> list[Group]:
    """This rank's responses by their prompts, in the prompts' order.

    Args:
        scores: (batch,) float.
    """
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(rollouts.prompt_index.tolist()):
        rows.setdefault(prompt, []).append(row)
    return [Group([rollouts[row] for row in of_prompt], scores[of_prompt]) for of_prompt in rows.values()]


def gather(ours: Sequence[Group]) -> list[Group]:
    """The groups of all ranks, in the ranks' order: a collective."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, list(ours))
    return [group for of_rank in everyones for group in of_rank]


def share_evenly(groups: Sequence[Group]) -> tuple[list[Group], float]:
    """This rank's part of groups that all ranks hold alike.

    Returns:
        The part, in the groups' order; and how many tokens the rank with the most has, over the mean: 1 is even.
    """
    costs = [group.num_tokens for group in groups]
    parts = partition(costs, dist.get_world_size())
    tokens = [sum(costs[number] for number in part) for part in parts]
    return [groups[number] for number in parts[dist.get_rank()]], max(tokens) * len(tokens) / max(sum(tokens), 1)


def versions_of(rollout: Rollout) -> np.ndarray:
    """(response_tokens,) int32: of the weights that made each token."""
    if rollout.versions is not None:
        return rollout.versions
    return np.full(len(rollout.response_ids), rollout.version, np.int32)


def join(groups: Sequence[Group]) -> tuple[RolloutBatch, np.ndarray]:
    """The groups as one batch, numbered from 0, and its scores, (responses,); at least one group."""
    rows = [rollout for group in groups for rollout in group.rollouts]
    generated = versions = None
    if any(row.generated is not None for row in rows):
        masks = [np.ones(len(row.response_ids), bool) if row.generated is None else row.generated for row in rows]
        generated = np.concatenate(masks)
    if any(row.versions is not None for row in rows):
        versions = np.concatenate([versions_of(row) for row in rows])
    batch = RolloutBatch(
        prompt_ids=np.concatenate([row.prompt_ids for row in rows]),
        prompt_lengths=np.array([len(row.prompt_ids) for row in rows], np.int32),
        response_ids=np.concatenate([row.response_ids for row in rows]),
        response_lengths=np.array([len(row.response_ids) for row in rows], np.int32),
        logprobs=np.concatenate([row.logprobs for row in rows]),
        finished=np.array([row.finish_reason == "stop" for row in rows]),
        prompt_index=np.repeat(np.arange(len(groups), dtype=np.int32), [len(group.rollouts) for group in groups]),
        version=rows[0].version,
        generated=generated,
        versions=versions,
    )
    return batch, np.concatenate([group.scores for group in groups])
