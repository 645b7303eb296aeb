"""Responses shared out over ranks: every group once, whole, and as many tokens for each rank as can be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainers.balance as balance
from rollout import RolloutBatch
from trainers.balance import groups_of, join, partition, share_evenly

COSTS = st.lists(st.integers(1, 500), max_size=40)


@given(costs=COSTS, parts=st.integers(1, 6))
def test_every_number_is_in_one_part_and_no_move_would_help(costs: list[int], parts: int):
    found = partition(costs, parts)
    assert len(found) == parts and sorted(sum(found, [])) == list(range(len(costs)))
    sums = [sum(costs[number] for number in part) for part in found]
    for part, total in zip(found, sums, strict=True):
        # The last that came, the smallest, came because the part had the least then; so it has the least without it.
        assert not part or total - min(costs[number] for number in part) <= min(sums)


def rollouts() -> RolloutBatch:
    """Prompts of two tokens: 0 with responses of 9 and 7 tokens, 1 with 1 and 1, 2 with 6 and 5."""
    lengths = np.array([9, 7, 1, 1, 6, 5], np.int32)
    return RolloutBatch(
        prompt_ids=np.repeat(np.arange(3, dtype=np.int32), 4),
        prompt_lengths=np.full(6, 2, np.int32),
        response_ids=np.repeat(np.arange(6, dtype=np.int32), lengths),
        response_lengths=lengths,
        logprobs=np.zeros(lengths.sum(), np.float32),
        finished=np.ones(6, bool),
        prompt_index=np.repeat(np.arange(3, dtype=np.int32), 2),
        version=1,
    )


@pytest.mark.parametrize(("rank", "prompts"), [(0, [0]), (1, [1, 2])])
def test_groups_stay_whole_and_ranks_get_like_amounts(monkeypatch: pytest.MonkeyPatch, rank: int, prompts: list[int]):
    monkeypatch.setattr(balance.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(balance.dist, "get_rank", lambda: rank)
    groups = groups_of(rollouts(), np.arange(6.0))
    assert [group.num_tokens for group in groups] == [18, 4, 13]
    ours, imbalance = share_evenly(groups)
    assert [int(group.rollouts[0].prompt_ids[0]) for group in ours] == prompts
    assert imbalance == pytest.approx(18 / 17.5)
    batch, scores = join(ours)
    assert scores.tolist() == [score for prompt in prompts for score in (2.0 * prompt, 2.0 * prompt + 1)]
    assert batch.prompt_index.tolist() == [number for number in range(len(prompts)) for _ in range(2)]
