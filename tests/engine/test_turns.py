"""Real vLLM, two ranks, several turns: the tokens of a loop by hand, whatever the schedule and whoever has the rows."""

import json
from pathlib import Path

import pytest

from tests.engine import turns_worker as worker
from tests.launch import launch

WORKER = Path(worker.__file__)
WHAT = ("response", "generated", "finished")


@pytest.fixture(scope="module")
def ranks(small_vocabulary_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("turns")
    done = launch([WORKER, small_vocabulary_model_path, out], nproc=2, timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_there_is_something_to_see(ranks: list[dict]) -> None:
    found = ranks[0]["asynchronous"]
    assert [rank["asynchronous"]["rows"] for rank in ranks] == [18, 24]
    assert found["metrics"]["rollout/turns_mean"] > 1.3 and len(found["computed"]) == worker.MAX_TURNS
    assert 0 < sum(found["finished"]) < len(found["finished"])
    assert found["metrics"]["rollout/observation_tokens"] == sum(mask.count(0) for mask in found["generated"])
    assert found["metrics"]["rollout/generated_tokens"] == sum(mask.count(1) for mask in found["generated"])
    assert all(mask[-1] for mask in found["generated"])
    assert all(rank["asynchronous"]["unsampled_logprobs"] == 0 for rank in ranks)


@pytest.mark.parametrize("other", ["by_hand", "backwards", "plain"])
def test_the_tokens_are_those_of_a_loop_by_hand_in_any_order_on_any_rank(ranks: list[dict], other: str) -> None:
    for rank in ranks:
        for name in WHAT:
            assert rank[other][name] == ranks[0]["asynchronous"][name]
    assert ranks[0]["asynchronous"]["share"] != ranks[1]["asynchronous"]["share"]


def test_rows_that_are_cut_and_carried_say_what_they_would_have_said(ranks: list[dict]) -> None:
    whole = ranks[0]["asynchronous"]
    for rank in ranks:
        parts = rank["in_parts"]
        assert parts["phases"] >= worker.SAMPLING.max_tokens // worker.PART
        for name in WHAT:
            assert parts[name] == whole[name]
        for found, expected in zip(parts["logprobs"], whole["logprobs"], strict=True):
            assert found == pytest.approx(expected, abs=1e-4)


def test_no_draw_comes_twice(ranks: list[dict]) -> None:
    """A row that drew the same numbers again would say much the same again."""
    again = total = 0
    found = ranks[0]["asynchronous"]
    for response, mask in zip(found["response"], found["generated"], strict=True):
        turns = "".join(map(str, mask)).split("0")
        starts, place = [], 0
        for turn in turns:
            if turn:
                starts.append(place)
            place += len(turn) + 1
        for before, after in zip(starts, starts[1:], strict=False):
            again += response[before] == response[after]
            total += 1
    assert total > 20 and again < total / 4


def test_the_cache_has_the_whole_blocks_of_earlier_turns(ranks: list[dict]) -> None:
    """Of a context of n tokens that was in the cache, less than a block and what the environment said are computed."""
    for contexts, computed in ranks[0]["asynchronous"]["computed"][1:]:
        assert computed < contexts / 2
    for contexts, computed in ranks[0]["plain"]["computed"][1:]:
        assert computed >= contexts * 0.9
