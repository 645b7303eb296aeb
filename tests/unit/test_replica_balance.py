"""Prompts shared out over replicas: each answered once, evenly by what is expected, the same on every rank."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.balance import PastLengths, packed, share_out, unpack
from rollout.driver import Collected
from rollout.types import Asked

RANKS = st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), max_size=6), min_size=4, max_size=4)


def asked(tokens: int, samples: int = 1) -> Asked:
    return Asked(np.zeros(tokens, np.int32), samples, max_tokens=1000)


@settings(deadline=None)
@given(given=RANKS, size=st.sampled_from([1, 2]), responses=st.randoms(use_true_random=False))
def test_each_prompt_has_one_replica_and_finds_its_way_back(given: list, size: int, responses):
    of_ranks = [[asked(tokens, samples) for tokens, samples in of_rank] for of_rank in given]
    everyones = [each for of_rank in of_ranks for each in of_rank]
    predicted = [responses.randint(1, 500) for _ in everyones]
    shares = share_out(of_ranks, predicted, size)
    replicas = range(4 // size)
    assert len(shares.of_replicas) == len(replicas)
    assert sorted(sum(shares.of_replicas, [])) == list(range(len(everyones)))
    costs = [len(each.prompt_ids) + each.samples * tokens for each, tokens in zip(everyones, predicted, strict=True)]
    sums = [sum(costs[number] for number in of_one) for of_one in shares.of_replicas]
    assert max(sums) - min(sums) <= max(costs, default=0), "no replica waits for more than one prompt"

    sequences = [(number, sample) for number, each in enumerate(everyones) for sample in range(each.samples)]
    for giver in range(4):
        found = {}
        for replica in replicas:
            answered = [sequences[row] for row in shares.sequences(replica)]
            places, rows = shares.places(replica, giver).tolist(), shares.rows(replica, giver).tolist()
            found |= {place: answered[row] for place, row in zip(places, rows, strict=True)}
            sender = shares.sender(replica, giver)
            assert sender // size == replica and (sender == giver or giver // size != replica)
        theirs = [each for each in sequences if shares.givers[each[0]] == giver]
        assert [found[place] for place in range(len(found))] == theirs
    assert all(len({shares.sender(r, giver) for giver in range(4)}) == size for r in replicas), "all send"


def test_a_long_tail_is_shared_out():
    """Eight prompts of a tail on one rank: with its own prompts that replica would take eight times as long."""
    shares = share_out([[asked(4)] * 8, [asked(4)] * 8], [800] * 8 + [100] * 8, tensor_parallel_size=1)
    assert [[number < 8 for number in of_one].count(True) for of_one in shares.of_replicas] == [4, 4]
    assert [len(of_one) for of_one in shares.of_replicas] == [8, 8]


def test_predictions_follow_the_last_responses():
    past = PastLengths()
    assert past.predict([[1] * 7, [2]], limits=[5, 3]) == [5, 1]
    past.note([1, 1], 3.0)
    past.note([1, 1], 40.0)
    assert past.predict([[1, 1]], limits=[100]) == [40], "as long as the last time"
    assert past.predict([[9, 9, 9]], limits=[100]) == [32], (
        "three tokens, times 43 of the responses over 4 of the prompts"
    )
    past.note(np.array([5], np.int32), 0.2)
    assert past.predict([[5], [1, 1]], limits=[30, 30]) == [1, 30]


def test_rows_are_packed_to_the_last_bit():
    rng = np.random.default_rng(0)
    ours = Collected.empty(6, 9)
    ours.lengths[:] = rng.integers(0, 10, 6)
    ours.finished[:] = rng.random(6) < 0.5
    valid = np.arange(9) < ours.lengths[:, None]
    ours.token_ids[valid] = rng.integers(0, 2**31, valid.sum())
    ours.logprobs[valid] = rng.standard_normal(valid.sum())
    rows, places = np.array([0, 1, 4, 5]), np.array([3, 2, 1, 0])
    theirs = Collected.empty(4, 9)
    words = packed(ours, rows)
    assert words.dtype == np.int32
    unpack(words, theirs, places)
    for name in ("token_ids", "logprobs", "lengths", "finished"):
        assert np.array_equal(getattr(theirs, name)[places], getattr(ours, name)[rows]), name
    unpack(packed(ours, rows[:0]), theirs, places[:0])
