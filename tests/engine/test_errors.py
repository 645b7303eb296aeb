"""Exceptions of the execute thread reach the main thread; misuse says what to do; closing never hangs."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("errors_worker.py")


@pytest.fixture(scope="module")
def results(small_vocabulary_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("errors")
    done = launch([WORKER, small_vocabulary_model_path, out], nproc=None, timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    return json.loads((out / "rank0.json").read_text())


def test_an_exception_in_a_step_reaches_the_caller_with_its_traceback(results: dict) -> None:
    planted = results["planted"]
    assert planted["type"] == "PlantedError"
    assert planted["message"] == "in execute-rank0"
    assert "errors_worker.py" in planted["traceback"] and "execute_thread.py" in planted["traceback"]
    assert planted["seconds"] < 10


def test_an_engine_that_failed_is_not_used_again(results: dict) -> None:
    assert results["after_failure"]["type"] == "RuntimeError"
    assert "broken by PlantedError while generating" in results["after_failure"]["message"]


def test_nothing_of_an_interrupted_phase_or_the_one_before_is_handed_out(results: dict) -> None:
    told = results["digest_after_failure"]
    assert told["type"] == "RuntimeError" and "broken by PlantedError while generating" in told["message"]


def test_a_closed_engine_says_so(results: dict) -> None:
    for told in results["after_close"]:
        assert told["type"] == "RuntimeError" and "is closed" in told["message"]


def test_closing_a_hanging_thread_ends_in_time_and_says_where_it_stands(results: dict) -> None:
    hanging = results["hanging_close"]
    assert hanging["type"] == "TimeoutError"
    assert "did not end within 5 s" in hanging["message"] and "wait" in hanging["message"]
    assert 5 <= hanging["seconds"] < 10
    assert results["threads_left"] == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("too_long", "prompt 0 of rank 0 has 113 tokens; between 1 and 112 fit"),
        ("empty", "prompt 0 of rank 0 has 0 tokens"),
        ("above_the_vocabulary", "prompt 1 of rank 0 has the token id 512; the model's are 0 to 511"),
        ("below_the_vocabulary", "prompt 0 of rank 0 has the token id -1;"),
        ("version", "version is -1"),
    ],
)
def test_bad_input_is_refused_and_the_engine_stays_usable(results: dict, case: str, words: str) -> None:
    assert results[case]["type"] == "ValueError"
    assert words in results[case]["message"]
    assert results["still_usable"] == 8


def test_a_phase_is_as_long_as_it_took(results: dict) -> None:
    assert 0.5 < results["slow_start"]["said"] <= results["slow_start"]["taken"]


def test_no_prompts_give_an_empty_batch(results: dict) -> None:
    assert results["no_prompts"] == 0


def test_an_engine_can_be_built_after_one_was_closed(results: dict) -> None:
    assert results["rebuilt"] == 8


def test_a_second_thread_is_refused_and_the_phase_goes_on(results: dict) -> None:
    generate, sync, _, close, _ = results["while_generating"]
    assert generate["type"] == sync["type"] == close["type"] == "RuntimeError"
    assert "is generating" in generate["message"] and "is generating" in sync["message"]
    assert "is generating on another thread" in close["message"]


def test_a_backward_pass_is_refused_while_the_engine_generates_and_only_then(results: dict) -> None:
    _, _, backward, _, afterwards = results["while_generating"]
    assert backward["type"] == "RuntimeError"
    assert "a backward pass reached the policy while the rollout engine generates" in backward["message"]
    assert afterwards["type"] is None


def test_a_fork_is_refused(results: dict) -> None:
    assert results["in_a_fork"]["type"] == "RuntimeError"
    assert "this is a fork of it" in results["in_a_fork"]["message"]
    assert results["usable_after_misuse"] == 8
