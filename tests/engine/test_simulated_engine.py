"""RolloutEngine on the simulated accelerator: the same tokens in both schedules, and a device that need not wait."""

import json
from pathlib import Path

import pytest

from tests.engine.simulated_engine_worker import MAX_TOKENS, STEP_MS
from tests.launch import launch

WORKER = Path(__file__).with_name("simulated_engine_worker.py")


@pytest.fixture(scope="module")
def ranks(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two ranks wrote, by schedule."""
    out = tmp_path_factory.mktemp("simulated")
    done = launch([WORKER, tiny_model_path, out], nproc=2, timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_the_same_tokens_in_both_schedules_and_on_both_ranks(ranks: list[dict]) -> None:
    assert len({each["digest"] for rank in ranks for each in rank.values()}) == 1


def test_every_step_occupied_the_device_for_the_time_asked_for(ranks: list[dict]) -> None:
    for rank in ranks:
        for each in rank.values():
            assert each["device_steps"] == each["metrics"]["rollout/decode_steps"] == MAX_TOKENS
            assert each["device_ms"] == pytest.approx(STEP_MS, abs=0.01)
            assert each["metrics"]["rollout/seconds"] > MAX_TOKENS * STEP_MS / 1e3


def test_asynchronous_scheduling_keeps_the_device_busier(ranks: list[dict]) -> None:
    for rank in ranks:
        asynchronous, synchronous = rank["asynchronous"]["metrics"], rank["synchronous"]["metrics"]
        assert asynchronous["rollout/host_gap_fraction"] < 0.5 * synchronous["rollout/host_gap_fraction"]
        # Launches return before the device is done; synchronous ones wait for it.
        assert asynchronous["rollout/launch_ms"] < STEP_MS < synchronous["rollout/launch_ms"]
