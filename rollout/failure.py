"""First failure wins: what breaks on any thread of any rank ends the job on every rank, soon, and with its own story.

A rank that fails leaves the others in a collective, in a spin on shared memory or in a backward pass, from which no
exception can free them. So a watch thread in every rank looks twice a second whether anybody has failed. The first one
who does writes its traceback into the job's store (torchrun's own TCPStore, over a connection of the watch's own).
Then every rank adds where its threads stand, one of them writes all of it to RUN/failure.json, and the processes end,
whatever their main threads are doing: the failed rank first, so that torchrun names it, and with exit code 1.

A rank that stands still for `stall_timeout_s` while it should make progress counts as failed. So does one whose watch
thread says nothing for as long: its process is stopped, or hangs in code that holds the interpreter's lock. Each rank
listens to the next one, and who ends the job also ends the silent ranks of its machine, which could not do it.
"""

import atexit
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

import psutil
import torch.distributed as dist

from rollout.world import launched_by_torchrun, this_machine

LOOK_S = 0.5  # between two looks at the store
STACKS_S = 3.0  # for the ranks to say where they stand
FAILED_RANK_ENDS_S = 4.0  # after it was noticed; torchrun then ends the others
ALL_END_S = 8.0
SILENCE = 0.8  # of the stall's time-out: who hangs is named before those who wait for it
LAST_RESORT_S = 5.0  # after the stall's time-out; then C code ends a process whose interpreter cannot
CLOSED = "closed"
FILE = "failure.json"


class Stalled(RuntimeError):
    """A rank made no progress for too long."""


@dataclass(frozen=True)
class Failure:
    """What went wrong first.

    Attributes:
        rank: of the whole job.
        host: its machine.
        thread: its name.
        error: type and message.
        traceback: as Python prints it; of a stall, where the main thread stood.
        time: seconds since 1970.
    """

    rank: int
    host: str
    thread: str
    error: str
    traceback: str
    time: float


class Watch:
    """This process's part in the job's watch. Use `watched`.

    Args:
        folder: where FILE goes; None writes none.
        stall_timeout_s: how long a busy rank may go without a `beat`, and any rank without a sign of life.
    """

    def __init__(self, folder: Path | None, stall_timeout_s: float) -> None:
        self._folder = folder
        self._stall_timeout_s = stall_timeout_s
        self._process = os.getpid()
        self._rank, self._size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._prefix = f"rollout/failure/{_agreed_attempt()}"
        self._store = self._connect()
        self._neighbour = (self._rank + 1) % self._size
        self._heard, self._heard_at = "", time.monotonic()
        self._signs = 0
        self._store.set(f"{self._prefix}/process/{self._rank}", json.dumps(_this_process()))
        self._busy: str | None = None
        self._beat = time.monotonic()
        self._reported: BaseException | None = None
        self._closing, self._told = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="rollout-watch", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    def report(self, error: BaseException, thread: str | None = None) -> None:
        """Tell the job that this rank has failed; returns at once. The first report of the job counts."""
        if os.getpid() != self._process:
            return  # a data worker, forked from this rank: its parent hears of it from the data loader
        story = "".join(traceback.format_exception(error))
        if self._size == 1 and threading.current_thread() is threading.main_thread():
            # Nobody waits for this process, and whoever called may know what to do (a notebook, say).
            with suppress(OSError):
                self._write(self._failure(error, story), {"0": stacks()})
            return
        self._reported = error
        self._tell(self._failure(error, story, thread))

    def beat(self) -> None:
        """Note that this rank makes progress."""
        self._beat = time.monotonic()

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Inside, this rank has to make progress. Inside another one, that one goes on at the end."""
        before, self._busy = self._busy, doing
        self.beat()
        try:
            yield
        finally:
            self.beat()
            self._busy = before

    def close(self) -> None:
        """End the watch. After a failure it goes on: it sees to it that this process ends."""
        if os.getpid() != self._process:
            return
        if self._reported is not None:
            self._told.wait(ALL_END_S)
            return
        atexit.unregister(self._at_exit)
        self._closing.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        with suppress(dist.DistError):
            self._store.set(f"{self._prefix}/alive/{self._rank}", CLOSED)

    @property
    def has_reported(self) -> bool:
        """True if an error of this rank is on its way to the others, or has arrived."""
        return self._reported is not None

    def has_told(self, error: BaseException | None) -> bool:
        """True if this very error was reported, and printed with it."""
        return error is not None and error is self._reported

    def _at_exit(self) -> None:
        """Somebody caught the error that the job ends for, and the interpreter would exit with code 0."""
        if self._reported is not None and os.getpid() == self._process:
            self._told.wait(ALL_END_S)
            _exit()

    def _connect(self) -> dist.Store:
        if not launched_by_torchrun():
            return dist.HashStore()
        # Not the default group's own: a rank may be waiting on that one for another.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)

    def _failure(self, error: BaseException, story: str, thread: str | None = None) -> Failure:
        name = thread or threading.current_thread().name
        return Failure(self._rank, socket.gethostname(), name, f"{type(error).__name__}: {error}", story, time.time())

    def _tell(self, failure: Failure) -> None:
        with suppress(dist.DistError):  # the store is gone, and with it the job: the loop ends this rank
            self._store.compare_set(f"{self._prefix}/first", "", json.dumps(asdict(failure)))

    def _loop(self) -> None:
        while not self._closing.wait(LOOK_S):
            self._look_for_stall()
            try:
                if self._size > 1:
                    self._give_and_take_signs_of_life()
                if not self._store.check([f"{self._prefix}/first"]):
                    continue
                failure = Failure(**json.loads(self._store.get(f"{self._prefix}/first")))
            except dist.DistError as error:
                self._launcher_is_gone(error)
            self._end(failure)

    def _look_for_stall(self) -> None:
        doing, still = self._busy, time.monotonic() - self._beat
        if doing is not None and still > self._stall_timeout_s:
            self._busy = None
            error = Stalled(
                f"rank {self._rank} made no progress for {still:.0f} s while {doing}; if it waits for another rank, "
                "that one's stacks say why"
            )
            story = f"{stacks()['MainThread']}Stalled: {error}\n"
            self._tell(self._failure(error, story, "MainThread"))

    def _give_and_take_signs_of_life(self) -> None:
        """Say that this rank is alive, and see that the next one does."""
        self._signs += 1
        self._store.set(f"{self._prefix}/alive/{self._rank}", str(self._signs))
        if (stderr := _real_stderr()) is not None:
            # A thread of C's own: it comes where an extension never gives the interpreter's lock back.
            faulthandler.dump_traceback_later(self._stall_timeout_s + LAST_RESORT_S, exit=True, file=stderr)
        key = f"{self._prefix}/alive/{self._neighbour}"
        said = self._store.get(key).decode() if self._store.check([key]) else ""
        if said != self._heard or said in ("", CLOSED):
            self._heard, self._heard_at = said, time.monotonic()
            return
        silent = time.monotonic() - self._heard_at
        if silent > SILENCE * self._stall_timeout_s:
            process = self._process_of(self._neighbour)
            error = (
                f"Stalled: rank {self._neighbour} gave no sign of life for {silent:.0f} s: process {process['pid']} on "
                f"{process['host']} is stopped, or hangs in code that holds the interpreter's lock"
            )
            self._tell(Failure(self._neighbour, process["host"], "rollout-watch", error, error + "\n", time.time()))

    def _process_of(self, rank: int) -> dict[str, Any]:
        return json.loads(self._store.get(f"{self._prefix}/process/{rank}"))

    def _end_silent(self, ranks: Iterable[int]) -> None:
        """Kill those of them that are processes of this machine."""
        for rank in ranks:
            with suppress(dist.DistError, psutil.Error):
                process = self._process_of(rank)
                there = psutil.Process(process["pid"]) if process["machine"] == this_machine().key else None
                if there is not None and there.create_time() == process["started"]:
                    there.kill()

    def _launcher_is_gone(self, error: Exception) -> NoReturn:
        """The store is torchrun's: without it nobody would end this rank if another one failed."""
        _complain(f"rank {self._rank}: ended, because the job's store is gone: {error}\n")
        _exit()

    def _end(self, failure: Failure) -> NoReturn:
        """Say what happened and where everybody stands, then end this process."""
        noticed = time.monotonic()
        ours = failure.rank == self._rank
        if ours:
            _complain(failure.traceback)
        else:
            first_line = failure.error.splitlines()[0]
            _complain(f"rank {self._rank}: ended, because rank {failure.rank} failed: {first_line}\n")
        silent: set[int] = set()
        try:
            self._store.set(f"{self._prefix}/stacks/{self._rank}", json.dumps(stacks()))
            said, silent = self._everyones_stacks(noticed + STACKS_S)
            self._write(failure, said)
        except (dist.DistError, OSError) as error:
            _complain(f"rank {self._rank}: {FILE} is incomplete: {error}\n")
        self._told.set()
        self._end_silent(silent & {failure.rank})
        # The main thread may be on its way out, cleaning up; if it makes it, this thread ends with the interpreter.
        time.sleep(max(0.0, noticed + (FAILED_RANK_ENDS_S if ours else ALL_END_S) - time.monotonic()))
        self._end_silent(silent)
        _exit()

    def _everyones_stacks(self, deadline: float) -> tuple[dict[str, Any], set[int]]:
        """By rank, then thread; and the ranks that say nothing in time."""
        keys = {rank: f"{self._prefix}/stacks/{rank}" for rank in range(self._size)}
        missing = set(keys)
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not self._store.check([keys[rank]])}
            if missing:
                time.sleep(LOOK_S / 5)
        said = {str(rank): json.loads(self._store.get(keys[rank])) for rank in keys if rank not in missing}
        said |= {str(rank): f"said nothing within {STACKS_S:g} s" for rank in sorted(missing)}
        return said, missing

    def _write(self, failure: Failure, everyones: dict[str, Any]) -> None:
        if self._folder is None:
            return
        content = json.dumps(asdict(failure) | {"stacks": everyones}, indent=1)
        try:
            # Whoever is first writes it: rank 0 may be the one that is gone.
            with open(self._folder / FILE, "x") as file:
                file.write(content + "\n")
        except FileExistsError:
            pass


_watch: Watch | None = None


@contextmanager
def watched(folder: Path | None = None, stall_timeout_s: float = 600.0) -> Iterator[Watch]:
    """Watch over the job inside the block; every rank enters it. Inside another one, that one goes on.

    Args:
        folder: of the run; failure.json is written there. None writes none.
        stall_timeout_s: how long a rank may make no progress inside `Watch.busy`.
    """
    global _watch
    if _watch is not None:
        yield _watch
        return
    _watch = watch = Watch(folder, stall_timeout_s)
    previous = sys.excepthook, threading.excepthook

    def of_main(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if not watch.has_told(error):
            previous[0](kind, error, where)

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and not issubclass(arguments.exc_type, SystemExit):
            watch.report(arguments.exc_value, arguments.thread.name if arguments.thread else None)
        previous[1](arguments)

    sys.excepthook, threading.excepthook = of_main, of_thread
    try:
        yield watch
    except BaseException as error:
        # SystemExit too, whatever its code: the other ranks go on, and would wait for this one for ever.
        watch.report(error)
        raise
    finally:
        watch.close()
        # Whoever has put a hook over ours keeps it; and ours has to know what was printed already.
        if threading.excepthook is of_thread:
            threading.excepthook = previous[1]
        if sys.excepthook is of_main and not watch.has_reported:
            sys.excepthook = previous[0]
        _watch = None


def beat() -> None:
    """Note that this rank makes progress, if it is watched: for long work inside `Watch.busy`."""
    if _watch is not None:
        _watch.beat()


def _agreed_attempt() -> str:
    """A name of this start of the job, the same on all ranks: a collective where there is a process group.

    A restarted job finds the store of the one before it. TORCHELASTIC_RESTART_COUNT does not tell the two apart: each
    node counts its own restarts, so that one which has come in place of a dead one begins at 0.
    """
    name = [f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{uuid.uuid4().hex[:8]}"]
    if dist.is_initialized():
        dist.broadcast_object_list(name, src=0)
        return name[0]
    return name[0].partition("-")[0]


def _this_process() -> dict[str, Any]:
    machine, process = this_machine(), psutil.Process()
    return {"host": machine.name, "machine": machine.key, "pid": process.pid, "started": process.create_time()}


def _real_stderr() -> TextIO | None:
    """Where C code can write; None in a notebook, whose stderr is no file."""
    try:
        return sys.stderr if sys.stderr.fileno() >= 0 else None
    except (OSError, ValueError, AttributeError):
        return sys.__stderr__


def _complain(text: str) -> None:
    """Print to stderr. A pipe that nobody reads any more must not end the thread that ends this process."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, end="", flush=True)


def _exit() -> NoReturn:
    """End this process whatever its main thread does, and its children, which might not notice."""
    try:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        sys.stdout.flush()
    finally:
        os._exit(1)


def stacks() -> dict[str, str]:
    """Where each thread of this process stands, by name, as a traceback without an error.

    >>> "stacks" in stacks()["MainThread"]
    True
    """
    frames = sys._current_frames()
    return {
        thread.name: "".join(traceback.format_stack(frames[thread.ident]))
        for thread in threading.enumerate()
        if thread.ident in frames
    }
