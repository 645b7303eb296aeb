"""Processes that score responses, or answer for an environment: bounded in time, replaced when they hang or die, gone
when their rank is gone.

Spawned, not forked: a fork would take over the engine's threads' locks and CUDA's state, and could use neither.
"""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from rollout import record_span
from trainers.errors import ConfigError
from trainers.reward_functions import Failed, judge
from trainers.reward_worker import serve

START_TIMEOUT_S = 120.0  # to import what the functions need, on a busy machine
END_TIMEOUT_S = 2.0


@dataclass
class Worker:
    """One process and what it is doing.

    Attributes:
        ready: False until it has loaded the functions.
        task: the number of the one that it works on, if any.
        deadline: when it has to be ready, or done, on time.monotonic's clock.
        given: when it got its task, on time.perf_counter's clock.
    """

    process: BaseProcess
    connection: Connection
    deadline: float
    ready: bool = False
    task: int | None = None
    given: float = 0.0

    @property
    def is_busy(self) -> bool:
        """True while it loads the functions, or has a task."""
        return not self.ready or self.task is not None


class RewardPool:
    """Worker processes of this rank.

    Start it from a thread that lives as long as the pool: Linux ends the workers with the thread that started them.

    Args:
        paths: of the functions; each worker loads them for itself.
        workers: how many processes.
        timeout_s: of one response.
        beat: called as responses are done, as a sign of life.
        judge: of the functions and a task, in a worker: a function at the top level of a module that loads fast.
        key: of the config that names the functions.

    Raises:
        ConfigError: if the functions cannot be loaded.
        RuntimeError: if a worker ends, or says nothing for START_TIMEOUT_S, while it starts.
    """

    def __init__(
        self,
        paths: Sequence[str],
        workers: int,
        timeout_s: float,
        beat: Callable[[], None] = lambda: None,
        judge: Callable[[dict[str, Any], Any], Any] = judge,
        key: str = "reward.functions",
    ) -> None:
        self._paths = list(paths)
        self._judge, self._key = judge, key
        self._timeout_s = timeout_s
        self._beat = beat
        self._context = multiprocessing.get_context("spawn")
        self._tasks: list[Any] = []
        self._waiting: deque[int] = deque()
        self._verdicts: dict[int, Any] = {}
        self._workers: list[Worker] = []
        try:
            self._workers = [self._start() for _ in range(workers)]
            while not all(worker.ready for worker in self._workers):
                self._look()
        except BaseException:
            self.close()
            raise

    def judge(self, tasks: Sequence[Any]) -> list[Any]:
        """`judge`'s verdict of each task, or a `Failed`, in the order of the tasks, whichever worker was done first.

        Each takes at most timeout_s. A worker that takes longer, or ends, is replaced, and its task has failed.
        """
        for task in tasks:
            self.submit(task)
        return self.collect()

    def submit(self, task: Any) -> None:
        """Have a worker judge it as soon as one is free and this process looks (`poll`, `collect`)."""
        self._waiting.append(len(self._tasks))
        self._tasks.append(task)

    def poll(self) -> int:
        """Take in what has been judged, and give the free workers more; waits for nothing.

        Returns:
            How many of the submitted tasks have a verdict.
        """
        self._give_out()
        self._look(at_most_s=0.0)
        self._give_out()
        return len(self._verdicts)

    def collect(self) -> list[list[float] | Failed]:
        """Wait for the verdicts of all that was submitted since the last time, in that order; see `judge`."""
        while len(self._verdicts) < len(self._tasks):
            self._give_out()
            self._look()
        verdicts = [self._verdicts[number] for number in range(len(self._tasks))]
        self._tasks, self._verdicts = [], {}
        return verdicts

    def close(self) -> None:
        """End all workers; a second call does nothing."""
        for worker in self._workers:
            worker.connection.close()
        give_up = time.monotonic() + END_TIMEOUT_S
        for worker in self._workers:
            worker.process.join(max(0.0, give_up - time.monotonic()))
            _kill(worker)
        self._workers = []

    def _start(self) -> Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve,
            args=(self._paths, self._key, self._judge, os.getpid(), theirs),
            name="reward-worker",
            daemon=True,
        )
        process.start()
        theirs.close()  # so that its end is heard
        return Worker(process, ours, time.monotonic() + START_TIMEOUT_S)

    def _give_out(self) -> None:
        for place, worker in enumerate(self._workers):
            if self._waiting and not worker.is_busy:
                if self._give(worker, self._waiting[0]):
                    self._waiting.popleft()
                else:
                    self._replace(place)

    def _give(self, worker: Worker, number: int) -> bool:
        """False if the worker ended while it had nothing to do (the kernel's memory killer, say)."""
        try:
            worker.connection.send(self._tasks[number])
        except OSError:
            return False
        worker.task, worker.deadline = number, time.monotonic() + self._timeout_s
        worker.given = time.perf_counter()
        return True

    def _look(self, at_most_s: float = float("inf")) -> None:
        """Wait for the next answer or the next deadline, or no longer than told, and take in what came."""
        busy = [worker for worker in self._workers if worker.is_busy]
        if not busy:
            return
        remaining = min(worker.deadline for worker in busy) - time.monotonic()
        spoken = wait([worker.connection for worker in busy], max(0.0, min(remaining, at_most_s)))
        for place, worker in enumerate(self._workers):
            if worker.connection in spoken:
                self._take(place)
            elif worker.is_busy and time.monotonic() > worker.deadline:
                limit = START_TIMEOUT_S if worker.task is None else self._timeout_s
                self._fail(place, f"took longer than {limit} s")
        self._beat()

    def _take(self, place: int) -> None:
        worker = self._workers[place]
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(END_TIMEOUT_S)
            self._fail(place, f"ended with exit code {worker.process.exitcode}")
            return
        if worker.task is not None:
            record_span(f"reward worker {place}", "reward", worker.given, time.perf_counter())
            self._verdicts[worker.task], worker.task = answer, None
        elif answer is not None:
            raise ConfigError(answer)
        worker.ready = True

    def _fail(self, place: int, what: str) -> None:
        worker = self._workers[place]
        if worker.task is None:
            raise RuntimeError(f"a worker of {self._key} {what} before it had loaded {', '.join(self._paths)}")
        self._verdicts[worker.task] = Failed(" or ".join(self._paths), f"the worker {what}")
        self._replace(place)

    def _replace(self, place: int) -> None:
        _kill(self._workers[place])
        self._workers[place].connection.close()
        self._workers[place] = self._start()


def _kill(worker: Worker) -> None:
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
