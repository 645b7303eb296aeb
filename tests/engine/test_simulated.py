"""The simulated accelerator under stock vLLM: real engine, timed forward, in both schedules, on one rank and on two."""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("simulated_worker.py")
SCHEDULES = ("synchronous", "asynchronous")
SCENARIOS = (*SCHEDULES, "synchronous_stops", "asynchronous_stops")
END = 2  # the test model's end of sequence
# As in the worker.
STEP_S, NUM_SEQUENCES, MAX_TOKENS = 0.05, 24, 12
LATE_STEP, LATE_S = 8, 0.6


def results(model: Path, out: Path, nproc: int | None) -> list[dict]:
    done = launch([WORKER, model, out], nproc=nproc, timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(nproc or 1)]


@pytest.fixture(scope="module")
def single(small_vocabulary_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one plain process wrote, by scenario."""
    return results(small_vocabulary_model_path, tmp_path_factory.mktemp("simulated"), nproc=None)[0]


@pytest.fixture(scope="module")
def ranks(small_vocabulary_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks wrote, by scenario; rank 1 launches step LATE_STEP late."""
    return results(small_vocabulary_model_path, tmp_path_factory.mktemp("simulated-ranks"), nproc=2)


def awaited_spans(result: dict) -> list[list[float]]:
    """Start and end of each step, without the last under asynchronous scheduling.

    That one may have been launched for nothing: when all sequences have ended in those before, nobody waits for it.
    """
    return result["spans"][:-1] if result["queue"] == 2 else result["spans"]


def test_both_schedules_are_vllms_own(single: dict) -> None:
    synchronous, asynchronous = single["synchronous"], single["asynchronous"]
    assert (synchronous["scheduler"], synchronous["queue"]) == ("Scheduler", 1)
    assert (asynchronous["scheduler"], asynchronous["queue"]) == ("AsyncScheduler", 2)
    assert synchronous["kinds"] == ["ModelRunnerOutput"]
    assert asynchronous["kinds"] == ["SimulatedOutput"]
    assert not any(synchronous["on_device"])
    assert statistics.mean(asynchronous["on_device"]) > 0.8  # all but the steps that begin with prompts alone


def test_both_schedules_give_the_same_tokens(single: dict, ranks: list[dict]) -> None:
    for key in ("tokens", "logprobs", "reasons"):
        for stops in ("", "_stops"):
            first = single["synchronous" + stops][key]
            assert all(each[name + stops][key] == first for each in (single, *ranks) for name in SCHEDULES)


def test_tokens_are_words_of_many_kinds_and_logprobs_are_logprobs(single: dict) -> None:
    tokens = [token for row in single["synchronous"]["tokens"] for token in row]
    assert len(tokens) == NUM_SEQUENCES * MAX_TOKENS
    assert all(0 <= token < 512 and token != END for token in tokens)
    assert len(set(tokens)) > 150  # 288 draws from 511: 220 on average
    logprobs = [value for row in single["synchronous"]["logprobs"] for value in row]
    assert all(-4.0 < value <= 0.0 for value in logprobs)
    assert len(set(logprobs)) > 280


def test_sequences_end_by_themselves_where_that_is_asked_for(single: dict) -> None:
    result = single["synchronous_stops"]
    lengths = [len(row) for row in result["tokens"]]
    assert len(set(lengths)) > 4
    # Each token ends the sequence with probability 1/4: 0.97 of the sequences within 12 tokens.
    assert result["reasons"].count("stop") >= NUM_SEQUENCES * 0.7
    for row, reason in zip(result["tokens"], result["reasons"], strict=True):
        assert [token == END for token in row] == [False] * (len(row) - 1) + [reason == "stop"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_forward_is_given_the_tokens_that_the_engine_reports(single: dict, scenario: str) -> None:
    assert single[scenario]["wrongly_fed"] == []


def test_launches_return_at_once_in_asynchronous_mode_alone(single: dict) -> None:
    assert statistics.median(single["asynchronous"]["launch_s"]) < STEP_S / 2
    assert min(single["synchronous"]["launch_s"]) >= STEP_S


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_device_runs_one_step_after_another(single: dict, ranks: list[dict], scenario: str) -> None:
    for result in (each[scenario] for each in (single, *ranks)):
        spans = awaited_spans(result)
        assert all(end - start == pytest.approx(STEP_S, abs=1e-6) for start, end in spans)
        gaps = [start - end for (_, end), (start, _) in zip(spans, spans[1:], strict=False)]
        assert min(gaps) >= 0.0
        assert result["seconds"] >= spans[-1][1] - spans[0][0] >= len(spans) * STEP_S - 1e-6


def test_the_host_works_while_the_device_does(single: dict) -> None:
    def median_gap(scenario: str) -> float:
        spans = awaited_spans(single[scenario])
        return statistics.median(start - end for (_, end), (start, _) in zip(spans, spans[1:], strict=False))

    assert median_gap("synchronous") > 1e-4  # the host's share of a step
    assert median_gap("asynchronous") == 0.0


def test_the_engine_starts_in_seconds_and_compiles_nothing(single: dict) -> None:
    assert single["asynchronous"]["start_s"] < 30.0  # 2 s on a quiet machine; compiled, a minute or two


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_rank_that_launches_late_delays_both(ranks: list[dict], scenario: str) -> None:
    one, two = (awaited_spans(rank[scenario]) for rank in ranks)
    assert one == two  # both devices are the one device of the group
    assert one[LATE_STEP][0] - one[LATE_STEP - 1][1] > LATE_S / 2


def test_the_kv_cache_uses_no_memory() -> None:
    import psutil
    import torch

    from rollout.backend.simulated import UntouchedMemory

    before = psutil.Process().memory_info().rss
    with UntouchedMemory():
        cache = torch.zeros(2**30, dtype=torch.int8)
        assert torch.ones(3).tolist() == [1.0, 1.0, 1.0]
    assert psutil.Process().memory_info().rss - before < 2**26
    assert cache[::4096].sum() == 0


def configuration(additional: dict, **changes: Any) -> SimpleNamespace:
    parallel = SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1)
    fields: dict = {
        "additional_config": additional,
        "parallel_config": parallel,
        "use_v2_model_runner": False,
        "speculative_config": None,
        "model_config": SimpleNamespace(runner_type="generate"),
    }
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize(
    ("additional", "changes", "message"),
    [
        ({}, {}, "simulate_step_ms is None"),
        ({"simulate_step_ms": 0}, {}, "simulate_step_ms is 0; .* above 0"),
        ({"simulate_step_ms": "fast"}, {}, "simulate_step_ms is 'fast'"),
        ({"simulate_step_ms": 1, "simulate_stops": 0}, {}, "simulate_stops is 0; .* at least 1"),
        ({"simulate_step_ms": 1}, {"use_v2_model_runner": True}, "cannot run .*VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"simulate_step_ms": 1}, {"speculative_config": object()}, "cannot run speculative decoding"),
    ],
)
def test_what_cannot_be_simulated_is_refused(additional: dict, changes: dict, message: str) -> None:
    from rollout.backend.simulated import _checked_step_ms

    with pytest.raises(ValueError, match=message):
        _checked_step_ms(configuration(additional, **changes))
    assert _checked_step_ms(configuration({"simulate_step_ms": 12})) == 12.0
