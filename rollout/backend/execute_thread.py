"""One thread that owns the worker: whatever touches it is a job in this thread's queue, in the order submitted."""

import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class ExecuteThread:
    """A thread that runs jobs first in, first out, and hands exceptions back with their traceback.

    Unlike `concurrent.futures.ThreadPoolExecutor`, whose threads the interpreter joins at exit without a limit, a job
    that hangs cannot keep the process alive, and a failed step stops the ones queued behind it.

    >>> thread = ExecuteThread("execute")
    >>> thread.run(pow, 2, 10)
    1024
    >>> thread.close(timeout_s=5.0)
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[tuple[Future, Callable, tuple, bool] | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[..., Any], *args: Any, future: Future | None = None, fatal: bool = False) -> Future:
        """Queue `job(*args)`; returns at once.

        Args:
            future: to be completed with the job's result; a new one by default.
            fatal: True if an exception in this job makes every later job fail with the same exception, unrun: the
                step behind a failed one would run on half-updated state.

        Raises:
            RuntimeError: if the thread was closed.
        """
        if self._closed:
            raise RuntimeError(f"the {self._thread.name} thread is closed")
        future = Future() if future is None else future
        self._jobs.put((future, job, args, fatal))
        return future

    def run(self, job: Callable[..., Any], *args: Any) -> Any:
        """Run `job(*args)` on the thread and wait for it; from the thread itself, run it on the spot."""
        if threading.current_thread() is self._thread:
            return job(*args)
        return self.submit(job, *args).result()

    def close(self, timeout_s: float) -> None:
        """Let the queued jobs finish, then end the thread.

        Raises:
            TimeoutError: if it has not ended after `timeout_s` seconds; says where it stands.
        """
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(
                f"the {self._thread.name} thread did not end within {timeout_s:g} s; it stands at:\n{self.stack()}"
            )

    def stack(self) -> str:
        """Where the thread stands now, as a traceback without an error."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "(ended)"

    def _loop(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job, args, fatal = item
            try:
                if self._failure is not None:
                    raise self._failure
                future.set_result(job(*args))
            except BaseException as error:  # the waiting thread must hear of anything at all, SystemExit too
                if fatal and self._failure is None:
                    self._failure = error
                future.set_exception(error)
            # A finished job must not keep its arguments (a model's weights, say) alive until the next one comes.
            del item, future, job, args
