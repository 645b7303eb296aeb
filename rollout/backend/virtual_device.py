"""A device that only takes time: steps queue up on it and end one after another, and no processor is busy meanwhile.

Step k starts when it has been launched and step k-1 has ended; it ends a set time later. The times are worked out, not
waited for, so a host that wakes late delays nothing but itself. Ranks of a tensor-parallel group are coupled as an
all-reduce couples them: a step starts once every rank has launched it, as their launch board tells.
"""

import threading
from collections import deque
from time import perf_counter, sleep
from typing import Any

import numpy as np

# Steps that a launch board remembers. A rank may be half of that ahead of the slowest: engines queue two.
BOARD_STEPS = 1024
POLL_S = 2e-4  # between two looks at the board for a rank that has not launched yet
PATIENCE_S = 300.0  # for such a rank: its process may be gone


class LaunchBoard:
    """When each rank of a group launched its last steps: one row a rank, read by all, without a lock.

    A slot is zero until its step is launched, and one aligned store fills it. The slots half a round ahead are emptied
    on the way, long after everybody has read them.

    Args:
        rank: in the group; the row that this board writes.
        times: (ranks, BOARD_STEPS) float64 of zeros, perf_counter seconds, in memory that all ranks of the group map.
            They must be on one host, where that clock is the same for all processes.

    >>> times = np.zeros((2, BOARD_STEPS))
    >>> mine, theirs = LaunchBoard(0, times), LaunchBoard(1, times)
    >>> mine.post(0, 1.5)
    >>> mine.all_launched(0)
    >>> theirs.post(0, 2.5)
    >>> mine.all_launched(0)
    2.5
    """

    def __init__(self, rank: int, times: np.ndarray) -> None:
        assert times.ndim == 2 and times.shape[1] == BOARD_STEPS, times.shape
        self._times = times
        self._mine = times[rank]

    @classmethod
    def alone(cls) -> "LaunchBoard":
        """The board of a group of one rank."""
        return cls(0, np.zeros((1, BOARD_STEPS)))

    def post(self, step: int, time: float) -> None:
        """Say that this rank launched `step` at `time`."""
        self._mine[(step + BOARD_STEPS // 2) % BOARD_STEPS] = 0.0
        self._mine[step % BOARD_STEPS] = time

    def all_launched(self, step: int) -> float | None:
        """When the last rank launched `step`; None if one has not yet."""
        times = self._times[:, step % BOARD_STEPS]
        return float(times.max()) if times.all() else None

    def missing(self, step: int) -> list[int]:
        """The ranks that have not launched `step`."""
        return np.flatnonzero(self._times[:, step % BOARD_STEPS] == 0.0).tolist()


class DeviceStep:
    """One step on a VirtualDevice; made by its `launch`.

    Attributes:
        number: of the step on its device, from 0.
        span: start and end in perf_counter seconds; None until every rank's launch is known, so valid after
            `synchronize`. The end may lie in the future.
    """

    def __init__(self, device: "VirtualDevice", number: int) -> None:
        self._device = device
        self.number = number
        self.span: tuple[float, float] | None = None
        self._give_up = perf_counter() + PATIENCE_S

    def query(self) -> bool:
        """True once the device has ended the step; returns at once, as that of a CUDA event.

        Raises:
            TimeoutError: if another rank has not launched the step within PATIENCE_S.
        """
        span = self._known_span()
        return span is not None and span[1] <= perf_counter()

    def synchronize(self) -> None:
        """Sleep until the device has ended the step; from any thread, with the interpreter free meanwhile.

        Raises:
            TimeoutError: if another rank has not launched the step within PATIENCE_S.
        """
        while (span := self._known_span()) is None:
            sleep(POLL_S)
        while (left := span[1] - perf_counter()) > 0:
            sleep(left)

    def _known_span(self) -> tuple[float, float] | None:
        span = self._device.span_of(self)
        if span is None and perf_counter() > self._give_up:
            raise TimeoutError(
                f"ranks {self._device.board.missing(self.number)} of the group did not launch step {self.number} "
                f"within {PATIENCE_S:g} s of this one: look for their error"
            )
        return span


class VirtualDevice:
    """Runs steps in the order of their launch, each for the same time.

    Args:
        step_s: seconds that every step takes, whatever its size.
        board: of the group that this device belongs to; a group of its own by default.

    >>> device = VirtualDevice(step_s=0.002)
    >>> first, second = device.launch(), device.launch()  # both return at once
    >>> second.synchronize()
    >>> round(second.span[1] - first.span[0], 6), second.span[0] == first.span[1]
    (0.004, True)
    """

    def __init__(self, step_s: float, board: LaunchBoard | None = None) -> None:
        assert step_s > 0.0, step_s
        self.board = LaunchBoard.alone() if board is None else board
        self._step_s = step_s
        self._launched = 0
        self._free_at = 0.0
        self._unknown: deque[DeviceStep] = deque()  # launched here; when they start is not known yet
        self._lock = threading.Lock()  # launches and waits come from different threads

    def launch(self) -> DeviceStep:
        """Put one step behind those under way; returns at once."""
        step = DeviceStep(self, self._launched)
        assert len(self._unknown) < BOARD_STEPS // 2, "the other ranks of the group are too far behind"
        self._unknown.append(step)
        self.board.post(step.number, perf_counter())
        self._launched += 1
        self._place_steps()
        return step

    def span_of(self, step: DeviceStep) -> tuple[float, float] | None:
        """Start and end of a step, or None where a rank has yet to launch it."""
        if step.span is None:
            self._place_steps()
        return step.span

    def _place_steps(self) -> None:
        with self._lock:
            while self._unknown and (launched := self.board.all_launched(self._unknown[0].number)) is not None:
                start = max(launched, self._free_at)
                self._free_at = start + self._step_s
                self._unknown.popleft().span = (start, self._free_at)


def map_board(memory: Any, rank: int, num_ranks: int) -> LaunchBoard:
    """The board of a group of ranks over `memory`, a writable buffer of `board_bytes(num_ranks)` bytes of zeros."""
    return LaunchBoard(rank, np.frombuffer(memory, np.float64).reshape(num_ranks, BOARD_STEPS))


def board_bytes(num_ranks: int) -> int:
    """Size of a group's launch board.

    >>> board_bytes(2)
    16384
    """
    return num_ranks * BOARD_STEPS * np.dtype(np.float64).itemsize
