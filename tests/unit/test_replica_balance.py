"""Prompts shared out over replicas: each answered once, evenly by what is expected, the same on every rank."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rollout.balance import PastLengths, packed, sequences, share_out, unpack
from rollout.driver import Collected

RANKS = st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=4, max_size=4)


@given(lengths=RANKS, n=st.integers(1, 3), size=st.sampled_from([1, 2]), responses=st.randoms(use_true_random=False))
def test_each_prompt_has_one_replica_and_finds_its_way_back(lengths: list[list[int]], n: int, size: int, responses):
    prompts_of_ranks = [[np.arange(length, dtype=np.int32) for length in of_rank] for of_rank in lengths]
    prompts = sum(prompts_of_ranks, [])
    predicted = [responses.randint(1, 500) for _ in prompts]
    shares = share_out(prompts_of_ranks, predicted, size, n)
    assert len(shares.of_replicas) == 4 // size
    assert sorted(sum(shares.of_replicas, [])) == list(range(len(prompts)))
    costs = [len(prompt) + n * tokens for prompt, tokens in zip(prompts, predicted, strict=True)]
    sums = [sum(costs[number] for number in of_one) for of_one in shares.of_replicas]
    assert max(sums) - min(sums) <= max(costs, default=0), "no replica waits for more than one prompt"
    for giver in range(4):
        found = [(r, row) for r in range(4 // size) for row in shares.rows(r, giver).tolist()]
        assert len(found) == n * len(lengths[giver])
        for replica in range(4 // size):
            sender = shares.sender(replica, giver)
            assert sender // size == replica and (sender == giver or giver // size != replica)
    assert all(len({shares.sender(r, giver) for giver in range(4)}) == size for r in range(4 // size)), "all send"


def test_a_long_tail_is_shared_out():
    """Eight prompts of a tail on one rank: with its own prompts that replica would take eight times as long."""
    prompts_of_ranks = [[np.zeros(4, np.int32)] * 8, [np.ones(4, np.int32)] * 8]
    shares = share_out(prompts_of_ranks, [800] * 8 + [100] * 8, tensor_parallel_size=1, n=1)
    assert [[number < 8 for number in of_one].count(True) for of_one in shares.of_replicas] == [4, 4]
    assert [len(of_one) for of_one in shares.of_replicas] == [8, 8]


def test_predictions_follow_the_last_responses():
    past = PastLengths()
    assert past.predict([[1] * 7, [2]], limit=5) == [5, 1]
    past.note([1, 1], 3.0)
    past.note([1, 1], 40.0)
    assert past.predict([[1, 1]], limit=100) == [40], "as long as the last time"
    assert past.predict([[9, 9, 9]], limit=100) == [32], "three tokens, times 43 of the responses over 4 of the prompts"
    past.note(np.array([5], np.int32), 0.2)
    assert past.predict([[5], [1, 1]], limit=30) == [1, 30]


def test_rows_are_packed_to_the_last_bit():
    rng = np.random.default_rng(0)
    ours = Collected.empty(6, 9)
    ours.lengths[:] = rng.integers(0, 10, 6)
    ours.finished[:] = rng.random(6) < 0.5
    valid = np.arange(9) < ours.lengths[:, None]
    ours.token_ids[valid] = rng.integers(0, 2**31, valid.sum())
    ours.logprobs[valid] = rng.standard_normal(valid.sum())
    rows, places = sequences(np.array([0, 2]), 2), np.array([3, 2, 1, 0])
    theirs = Collected.empty(4, 9)
    words = packed(ours, rows)
    assert words.dtype == np.int32
    unpack(words, theirs, places)
    for name in ("token_ids", "logprobs", "lengths", "finished"):
        assert np.array_equal(getattr(theirs, name)[places], getattr(ours, name)[rows]), name
    unpack(packed(ours, rows[:0]), theirs, places[:0])
