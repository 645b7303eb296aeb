"""The virtual device: when steps start and end, that waiting costs nothing, and how ranks are coupled."""

import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from rollout.backend import virtual_device
from rollout.backend.virtual_device import BOARD_STEPS, LaunchBoard, VirtualDevice, board_bytes, map_board


class Clock:
    """Stands for perf_counter and sleep: sleeping moves it on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10.0
        self.slept: list[float] = []
        monkeypatch.setattr(virtual_device, "perf_counter", lambda: self.now)
        monkeypatch.setattr(virtual_device, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def two_devices(step_s: float) -> tuple[VirtualDevice, VirtualDevice]:
    """The devices of a group of two ranks, over memory as they would map it."""
    memory = bytearray(board_bytes(2))
    return tuple(VirtualDevice(step_s, map_board(memory, rank, 2)) for rank in range(2))  # type: ignore[return-value]


def test_a_step_starts_when_it_is_launched_and_the_one_before_has_ended(clock: Clock) -> None:
    device = VirtualDevice(step_s=0.25)
    first = device.launch()  # at 10.0, on a free device
    clock.now = 10.125
    second = device.launch()  # 10.125, behind the first
    clock.now = 11.0
    third = device.launch()  # after a gap of half a second
    assert (first.span, second.span, third.span) == ((10.0, 10.25), (10.25, 10.5), (11.0, 11.25))
    assert [step.number for step in (first, second, third)] == [0, 1, 2]


def test_waiting_ends_with_the_step_and_a_late_wait_at_once(clock: Clock) -> None:
    device = VirtualDevice(step_s=0.25)
    first, second = device.launch(), device.launch()
    second.synchronize()
    assert clock.now == 10.5
    first.synchronize()
    assert (clock.now, clock.slept) == (10.5, [0.5])


def test_a_group_starts_with_its_last_rank(clock: Clock) -> None:
    one, two = two_devices(step_s=0.25)
    early = one.launch()  # 10.0
    also_early = one.launch()
    assert early.span is None and one.span_of(early) is None
    clock.now = 10.125
    late = two.launch()
    assert one.span_of(early) == late.span == (10.125, 10.375)
    assert one.span_of(also_early) is None
    clock.now = 11.0
    also_late = two.launch()
    assert one.span_of(also_early) == two.span_of(also_late) == (11.0, 11.25)


def test_who_waits_for_another_rank_polls_and_gives_up(clock: Clock) -> None:
    one, two = two_devices(step_s=0.25)
    step = one.launch()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of the group did not launch step 0 within 300 s"):
        step.synchronize()
    assert clock.now >= 310.0
    two.launch()  # at 310
    assert one.span_of(step) == (pytest.approx(310.0, abs=0.01), pytest.approx(310.25, abs=0.01))


def test_slots_are_used_again_and_never_read_stale(clock: Clock) -> None:
    one, two = two_devices(step_s=0.25)
    for number in range(3 * BOARD_STEPS):
        step = one.launch()
        assert one.span_of(step) is None, number  # not what stood in this slot a round ago
        clock.now += 1.0
        assert two.launch().span == one.span_of(step) == (clock.now, clock.now + 0.25)


def test_a_rank_far_ahead_is_stopped() -> None:
    one, _ = two_devices(step_s=0.25)
    for _ in range(BOARD_STEPS // 2):
        one.launch()
    with pytest.raises(AssertionError, match="too far behind"):
        one.launch()


def test_a_lone_device_may_run_any_distance_ahead() -> None:
    device = VirtualDevice(step_s=1e3)
    start = time.perf_counter()
    steps = [device.launch() for _ in range(2 * BOARD_STEPS)]
    assert time.perf_counter() - start < 1.0  # launches return at once
    first, last = steps[0].span, steps[-1].span
    assert first is not None and last is not None
    assert last[1] - first[0] == pytest.approx(2 * BOARD_STEPS * 1e3)


@pytest.fixture
def patient_interpreter() -> Iterator[None]:
    """A thread that holds the interpreter without sleeping keeps it: none is asked to let go within a test."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10.0)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_interpreter_is_free_and_the_processor_idle_while_waiting(
    num_ranks: int, patient_interpreter: None
) -> None:
    step_s, count, done = 0.3, 0, threading.Event()
    times = np.zeros((num_ranks, BOARD_STEPS))
    device = VirtualDevice(step_s, LaunchBoard(0, times))

    def work() -> None:
        nonlocal count
        while not done.is_set():
            time.sleep(0.001)
            count += 1
            if num_ranks == 2 and count == 50:
                LaunchBoard(1, times).post(0, time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    step = device.launch()
    before, start, processor = count, time.perf_counter(), time.thread_time()
    step.synchronize()
    seconds, processor, progress = time.perf_counter() - start, time.thread_time() - processor, count - before
    done.set()
    thread.join()
    assert step_s * 0.9 < seconds < step_s + (0.3 if num_ranks == 1 else 0.8)
    assert progress > 50  # of some 250 on an idle machine
    assert processor < 0.1 * seconds, processor


def test_a_query_is_true_once_the_step_has_ended_and_gives_up_on_a_rank_that_is_gone(clock: Clock) -> None:
    mine, theirs = two_devices(0.010)
    step = mine.launch()
    assert not step.query() and clock.slept == []
    theirs.launch()
    clock.now += 0.009
    assert not step.query()
    clock.now += 0.001
    assert step.query()
    alone = mine.launch()
    clock.now += virtual_device.PATIENCE_S + 1.0
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of the group did not launch step 1"):
        alone.query()
