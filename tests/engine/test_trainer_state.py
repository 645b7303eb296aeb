"""Trainer and engine in one process, and neither moves what the other counts on."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("trainer_state_worker.py")


@pytest.fixture(scope="module")
def ranks(small_vocabulary_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("trainer-state")
    done = launch([WORKER, small_vocabulary_model_path, out], nproc=2, timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("trainer", ["drawing", "quiet"])
def test_the_engine_leaves_the_trainers_state_as_it_was(ranks: list[dict], trainer: str) -> None:
    """After building, each sync, each phase, and after closing: generators, signal handlers, hooks and the rest."""
    for rank in ranks:
        changed = rank[trainer]["changed"]
        assert {"build", "sync before sampled", "sampled", "close"} <= changed.keys()
        assert {call: names for call, names in changed.items() if names} == {}


def test_the_trainers_draws_leave_the_rollouts_as_they_were(ranks: list[dict]) -> None:
    """Other random numbers on each rank, between any two calls: the same tokens on both ranks, and as without."""
    expected = ranks[0]["quiet"]["digests"]
    assert len(set(expected.values())) == len(expected) == 3
    for rank in ranks:
        assert rank["quiet"]["digests"] == expected
        assert rank["drawing"]["digests"] == expected
