"""One thread that owns the worker: whatever touches it is a job in this thread's queue, in the order submitted."""

import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple


class Job(NamedTuple):
    """What the thread is to do.

    Attributes:
        future: completed with what `call(*args)` returns or raises.
        fatal: True if its exception stops all later jobs but those that run always.
        always: True if it runs after such an exception, too.
    """

    future: Future
    call: Callable[..., Any]
    args: tuple
    fatal: bool
    always: bool


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
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """True after an exception in a fatal job."""
        return self._failure is not None

    @property
    def has_ended(self) -> bool:
        """True once it runs nothing any more."""
        return not self._thread.is_alive()

    def submit(
        self,
        job: Callable[..., Any],
        *args: Any,
        future: Future | None = None,
        fatal: bool = False,
        always: bool = False,
    ) -> Future:
        """Queue `job(*args)`; returns at once.

        Args:
            future: to be completed with the job's result; a new one by default.
            fatal: True if an exception in this job makes every later job fail with the same exception, unrun: the
                step behind a failed one would run on half-updated state.
            always: True for a job that runs even then: the worker's shutdown.

        Raises:
            RuntimeError: if the thread was closed.
        """
        if self._closed:
            raise RuntimeError(f"the {self._thread.name} thread is closed")
        future = Future() if future is None else future
        self._jobs.put(Job(future, job, args, fatal, always))
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
        while (job := self._jobs.get()) is not None:
            try:
                if self._failure is not None and not job.always:
                    raise self._failure
                job.future.set_result(job.call(*job.args))
            except BaseException as error:  # the waiting thread must hear of anything at all, SystemExit too
                if job.fatal and self._failure is None:
                    self._failure = error
                job.future.set_exception(error)
            # A finished job must not keep its arguments (a model's weights, say) alive until the next one comes.
            del job
