"""The processes of a benchmark: each system under a torchrun of its own, alive together, taking turns.

A turn is a line of JSON into a named pipe that rank 0 of the system reads; the answer comes back through another. Who
does not have the turn sleeps in a read (rank 0) or in gloo (the others). What an idle system still costs is gloo's own:
its loops wake a hundred times a second, 1.6% of a core a rank on two cores of an AMD EPYC.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from rollout.backend.shared_memory import unlink_shared_memory
from scripts.bench.plan import TAG, Settings

ROOT = Path(__file__).resolve().parents[2]
WORKER_MODULE = "scripts.bench.systems"
LOOK_AGAIN_S = 0.5  # how soon the death of a process is noticed
GRACE_S = 30.0  # for a system that was asked to end; torchrun gives its ranks as long
TAIL_LINES = 15


class SystemDied(RuntimeError):
    """A system ended or hung before it answered; the message has its exit code and the ends of its logs."""


class System:
    """The processes of one system, from start to end. `with running(...)` makes sure of the end.

    Args:
        settings: for its ranks.
        folder: for its pipes and logs; is made.
        timeout_s: the longest that the start or a turn may take.
    """

    def __init__(self, settings: Settings, folder: Path, timeout_s: float) -> None:
        self.name = settings.system
        self.folder = folder
        self.timeout_s = timeout_s
        self._tag = uuid.uuid4().hex
        self._unread = b""
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(asdict(settings)))
        pipes = [folder / "turns", folder / "answers"]
        for pipe in pipes:
            os.mkfifo(pipe)
        # Opened for both directions: opening waits for nobody, and a write into the pipe of the dead raises nothing.
        self._turns, self._answers = (os.open(pipe, os.O_RDWR) for pipe in pipes)
        self._process = self._start(settings.tensor_parallel_size * settings.replicas)

    def answer(self) -> dict[str, Any]:
        """The next line of rank 0: how it was built, after the start; a turn's figures, after `take`.

        Raises:
            SystemDied: if its torchrun ends, or time is up, before the line is there.
        """
        deadline = time.monotonic() + self.timeout_s
        while b"\n" not in self._unread:
            ended = self._process.poll()  # looked up before the pipe, so that no last word is missed
            ready, _, _ = select.select([self._answers], [], [], 0.0 if ended is not None else LOOK_AGAIN_S)
            if ready:
                self._unread += os.read(self._answers, 1 << 16)
            elif ended is not None:
                raise SystemDied(f"{self.name} ended with exit code {ended}\n{self._tails()}")
            elif time.monotonic() > deadline:
                raise SystemDied(f"{self.name} gave no answer within {self.timeout_s:.0f} s\n{self._tails()}")
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def take(self, **turn: Any) -> dict[str, Any]:
        """Give this system the turn and wait for its figures.

        Raises:
            SystemDied: as `answer`.
        """
        os.write(self._turns, json.dumps(turn).encode() + b"\n")
        return self.answer()

    def close(self, at_once: bool = False) -> None:
        """End the system's processes, by the end of its pipe or, at once, by a signal; those and no others."""
        if self._turns < 0:
            return
        os.close(self._turns)
        self._turns = -1
        try:
            if not at_once:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(GRACE_S)
            for end in (psutil.Process.terminate, psutil.Process.kill):
                alive = _processes_of(self._tag)
                for process in alive:
                    _quietly(end, process)
                psutil.wait_procs(alive, timeout=GRACE_S)
        finally:
            os.close(self._answers)
            self._process.poll()
            # Stock vLLM gives its segments back when it has started; one that was ended before has left them.
            unlink_shared_memory(self._tag)

    def _start(self, nproc: int) -> subprocess.Popen:
        # Port 0: a free one. A log for each rank: written into one, lines of two ranks would run into each other.
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", f"--log-dir={self.folder / 'logs'}"]
        command += ["--redirects=3", "-m", WORKER_MODULE, str(self.folder)]
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        defaults = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**defaults, **os.environ, "PYTHONPATH": python_path, TAG: self._tag}
        with open(self.folder / "torchrun.log", "w") as log:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends everybody in order.
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _tails(self) -> str:
        """The last lines of every log that says anything, and where the whole of it is."""
        logs = sorted(log for log in self.folder.rglob("*.log") if log.stat().st_size)
        parts = [f"logs: {self.folder}"]
        for log in logs:
            lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            parts.append("\n".join([f"--- {log.relative_to(self.folder)}, its end ---", *lines]))
        return "\n".join(parts)


@contextlib.contextmanager
def running(settings: list[Settings], folder: Path, timeout_s: float) -> Iterator[dict[str, tuple[System, dict]]]:
    """Start systems one after the other, and end all of them however the block is left.

    One after the other, since each looks at the free memory of the device when it starts.

    Yields:
        By name: the system, and what it said about itself when it was built.

    Raises:
        SystemDied: if one does not start.
    """
    systems: dict[str, tuple[System, dict]] = {}
    started: list[System] = []
    at_once = True
    try:
        for each in settings:
            started.append(System(each, folder / each.system, timeout_s))
            systems[each.system] = (started[-1], started[-1].answer())
        yield systems
        at_once = False
    finally:
        for system in started:
            system.close(at_once)


def _processes_of(tag: str) -> list[psutil.Process]:
    """The running processes that carry a system's tag."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _quietly(end: Callable[[psutil.Process], None], process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        end(process)
