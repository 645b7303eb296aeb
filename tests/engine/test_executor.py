"""The executor's own parts: waiting for a step, replicas' seeds, the trainer's stream, and the end of a worker."""

import threading
import time
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput

import rollout.backend.executor as executor_module
from rollout.backend.execute_thread import ExecuteThread
from rollout.backend.executor import COPY_EVENTS, COPY_POLL_S, StepFuture, TorchrunExecutor, seeds_of_replica


def test_vllms_process_of_its_own_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING is 1.*set it to 0"):
        TorchrunExecutor._init_executor(TorchrunExecutor.__new__(TorchrunExecutor))


class Event:
    """Of a copy that takes `seconds`, like torch.cuda.Event."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.perf_counter() + seconds
        self.queries = 0

    def query(self) -> bool:
        self.queries += 1
        return time.perf_counter() >= self.ends


class Output(AsyncModelRunnerOutput):
    """A step's output under asynchronous scheduling, by vLLM's V2 or V1 runner's name for the event."""

    def __init__(self, name: str, event: Event) -> None:
        setattr(self, name, event)
        self.event = event

    def get_output(self) -> Any:
        assert self.event.query(), "it would wait without a limit"
        return "tokens"


def launched(seconds: float, name: str = COPY_EVENTS[0]) -> tuple[StepFuture, Event]:
    future, event = StepFuture(), Event(seconds)
    future.set_result(Output(name, event))
    return future, event


@pytest.mark.parametrize("name", COPY_EVENTS)
def test_a_wait_for_a_step_on_the_device_ends_in_time(name: str) -> None:
    future, event = launched(0.2, name)
    start = time.perf_counter()
    assert not future.wait(0.05)
    with pytest.raises(TimeoutError):
        future.result(0.02)
    assert time.perf_counter() - start < 0.15
    assert future.wait(5.0)
    assert event.ends <= time.perf_counter() < event.ends + 0.5
    assert future.result() == "tokens" == future.result(0.0)


def test_a_step_that_is_done_is_looked_at_once_and_one_that_is_not_rarely() -> None:
    future, event = launched(0.0)
    assert future.wait(1.0) and event.queries == 1
    future, event = launched(0.1)
    assert future.wait(1.0) and event.queries <= 0.1 / COPY_POLL_S + 2


def test_a_wait_is_over_when_the_step_has_failed_or_came_whole() -> None:
    failed, whole = StepFuture(), StepFuture()
    assert not failed.wait(0.01)
    failed.set_exception(TimeoutError("the step's own"))
    assert failed.wait(0.0)
    with pytest.raises(TimeoutError, match="the step's own"):
        failed.result()
    whole.set_result("tokens")
    assert whole.wait(0.0) and whole.result() == "tokens"


def test_a_timeout_inside_of_the_device_is_no_reason_to_go_on_waiting() -> None:
    future, event = launched(0.0)

    def gone() -> bool:
        raise TimeoutError("rank 1 did not launch step 7")

    event.query = gone  # type: ignore[method-assign]
    with pytest.raises(TimeoutError, match="rank 1 did not launch step 7"):
        future.wait(1.0)


def test_replicas_draw_other_seeds_and_the_first_what_it_always_drew() -> None:
    draws = [seeds_of_replica(7, replica).integers(2**63 - 1, size=4).tolist() for replica in (0, 1, 2)]
    assert len({tuple(each) for each in draws}) == 3
    assert draws[0] == np.random.default_rng(7).integers(2**63 - 1, size=4).tolist()
    assert draws[1] == seeds_of_replica(7, 1).integers(2**63 - 1, size=4).tolist()


def bare_executor(**parts: Any) -> TorchrunExecutor:
    """With an execute thread, and nothing built."""
    executor = TorchrunExecutor.__new__(TorchrunExecutor)
    executor.thread = ExecuteThread("execute-test")
    for name, part in parts.items():
        setattr(executor, name, part)
    return executor


@pytest.mark.parametrize("call", ["load_policy_weights", "check_policy_weights"])
def test_the_policy_is_read_between_the_trainers_updates(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """On CUDA: after what the trainer's stream has under way, and the trainer goes on after the reads."""
    order: list[str] = []

    class Stream:
        def record_event(self) -> str:
            order.append(f"update recorded on {threading.current_thread().name}")
            return "update"

        def wait_event(self, event: str) -> None:
            order.append(f"wait for {event}")

        def synchronize(self) -> None:
            order.append("reads done")

    sync = SimpleNamespace(load=lambda weights: order.append("read"), check=lambda weights: order.append("read"))
    monkeypatch.setattr(executor_module.current_platform, "is_cuda", lambda: True, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    executor = bare_executor(_weight_sync=sync)
    getattr(executor, call)({})
    executor.thread.close(5.0)
    assert order == ["update recorded on MainThread", "wait for update", "read", "reads done"]


class Worker:
    """Whose shutdown fails."""

    def __init__(self) -> None:
        self.shut_down_on = ""

    def shutdown(self) -> None:
        self.shut_down_on = threading.current_thread().name
        raise OSError("the device is lost")


def test_a_shutdown_that_fails_is_an_error() -> None:
    executor, worker = bare_executor(), Worker()
    executor.driver_worker = worker
    with pytest.raises(OSError, match="the device is lost"):
        executor.shutdown()
    assert worker.shut_down_on == "execute-test" and executor.thread.has_ended
    executor.shutdown()  # safe to call twice


def test_a_shutdown_that_fails_hides_no_earlier_error() -> None:
    executor = bare_executor(driver_worker=Worker())
    with pytest.warns(UserWarning, match="did not shut down cleanly: (.|\n)*OSError: the device is lost"):
        try:
            raise ValueError("the first one")
        except ValueError:
            executor.shutdown()


def test_after_a_failed_step_the_worker_is_still_shut_down() -> None:
    executor, worker = bare_executor(), Worker()
    executor.driver_worker = worker
    step = executor.thread.submit(lambda: 1 / 0, fatal=True)
    with pytest.raises(ZeroDivisionError):
        executor.thread.run(lambda: "unrun")
    with pytest.warns(UserWarning, match="the device is lost"):
        executor.shutdown()
    assert isinstance(step.exception(), ZeroDivisionError)
    assert worker.shut_down_on == "execute-test"


def test_a_worker_that_ends_well_says_nothing() -> None:
    executor = bare_executor(driver_worker=SimpleNamespace(shutdown=lambda: None), _weight_sync=object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        executor.shutdown()
    assert executor._weight_sync is None
