"""Ranks that drift apart stop, all of them, with one message that says where and how."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("agreement_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("agreement")
    done = launch([WORKER, out], nproc=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_equal_ranks_run_on(ranks: list[dict]) -> None:
    for rank in ranks:
        assert [phase["message"] for phase in [*rank["equal"], rank["long"]]] == [None] * 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("token", "request 3: token 213 with log-prob -0.5 on rank 0, token 214 with log-prob -0.5 on rank 1"),
        ("logprob", "request 3: token 213 with log-prob -0.5 on rank 0, token 213 with log-prob -0.4999999"),
        ("count", "request 4: 1 tokens scheduled on rank 0, 2 tokens scheduled on rank 1"),
        ("position", "request 2: a token at position 121 on rank 0, a token at position 122 on rank 1"),
        ("missing", "request 4: 1 tokens scheduled on rank 0, 0 tokens scheduled on rank 1"),
        ("order", "all requests: in the order 0, 1, 2, 3, 4, 5 on rank 0, in the order 5, 4, 3, 2, 1, 0 on rank 1"),
    ],
)
def test_what_differs_is_named_on_every_rank(ranks: list[dict], change: str, expected: str) -> None:
    messages = {rank[change]["message"] for rank in ranks}
    assert len(messages) == 1, "the same on every rank"
    message = messages.pop()
    assert message is not None and f"step 21 of the phase, {expected}" in message
    # Whoever comes later finds it; nothing else holds these ranks together.
    assert min(rank[change]["steps"] for rank in ranks) <= 21 + 16, "found within the steps between comparisons"


def test_a_difference_in_the_last_step_is_found_before_the_phase_ends(ranks: list[dict]) -> None:
    assert all("step 39 of the phase, request 3" in rank["last"]["message"] for rank in ranks)


def test_who_comes_late_compares_and_the_other_hears_of_it(ranks: list[dict]) -> None:
    assert all("step 5 of the phase, request 3" in rank["behind"]["message"] for rank in ranks)


def test_a_rank_that_hangs_cannot_keep_the_other(ranks: list[dict]) -> None:
    assert "another rank did not come to say how" in ranks[0]["silent"]["message"]
    assert ranks[0]["silent"]["seconds"] < 8.0


def test_the_board_has_no_name_left(ranks: list[dict]) -> None:
    assert [rank["named"] for rank in ranks] == [[], []]


def test_a_step_costs_microseconds(ranks: list[dict]) -> None:
    # 512 sequences; a decode step of the fastest device here, the simulated one, takes 12 ms: a hundredth is 120 us.
    assert min(rank["cost"] for rank in ranks) < 120e-6
