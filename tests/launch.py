"""Run a script in processes of its own, under torchrun or plainly, with a time limit and nothing left behind."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent

# Found again in the environment of every process of one launch: torchrun puts each rank into a session of its own, so
# that no process group holds them all.
TAG = "TORCHRUN_ROLLOUT_LAUNCH"
GRACE_S = 10.0
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Completed:
    """What a launch left.

    Attributes:
        returncode: of torchrun, or of the plain process; 0 is success.
        stdout: of all ranks, one rank after the other, then torchrun's own.
        stderr: likewise; torchrun's own has its report of a failure.
        seconds: from start to end.
        left_running: command lines of processes of this launch that outlived it by GRACE_S, and were then killed.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    left_running: list[str]


def launch(
    command: str | Path | Sequence[str | Path],
    nproc: int | None = 2,
    timeout_s: float = 120.0,
    env: Mapping[str, str | None] | None = None,
) -> Completed:
    """Run a script from the repository's root and wait for its end.

    Args:
        command: the script, or the script with its arguments.
        nproc: ranks under torchrun, on a free port of this host; None runs the script without torchrun.
        timeout_s: then the processes of this launch, and no others, get SIGTERM and after GRACE_S SIGKILL.
        env: environment variables beside SETTINGS, over them; None takes one away.

    Raises:
        TimeoutError: if the script is not done in time; with the tail of its output.
    """
    words = [command] if isinstance(command, str | Path) else list(command)
    launcher: list[str] = [sys.executable]
    if nproc is not None:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={nproc}", "--rdzv-backend=c10d"]
        launcher += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    logs = Path(tempfile.mkdtemp(prefix="launch-"))
    if nproc is not None:
        # A file for each rank: written to one, the lines of two ranks that print at once would run into each other.
        launcher += [f"--log-dir={logs}", "--redirects=3"]
    tag = uuid.uuid4().hex
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    given = {**os.environ, **SETTINGS, "PYTHONPATH": python_path, **(env or {}), TAG: tag}
    variables = {name: value for name, value in given.items() if value is not None}

    # Files, not pipes: a process that outlives the launch would hold a pipe open and us with it.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.monotonic()
        process = subprocess.Popen(
            [*launcher, *map(str, words)], cwd=ROOT, env=variables, stdout=out, stderr=err, start_new_session=True
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            for each in _processes_of(tag):
                _signal(each.terminate)
        finally:  # also when pytest's own time limit interrupts the wait
            seconds = time.monotonic() - start
            left_running = _end(tag)
            process.wait()
        stdout = _of_ranks(logs, "stdout.log") + _read(out)
        stderr = _of_ranks(logs, "stderr.log") + _read(err)
        shutil.rmtree(logs)
    if timed_out:
        raise TimeoutError(
            f"{' '.join(map(str, words))} was not done after {timeout_s} s\n"
            f"--- stdout, its end ---\n{stdout[-4000:]}\n--- stderr, its end ---\n{stderr[-4000:]}"
        )
    return Completed(process.returncode, stdout, stderr, seconds, left_running)


def _end(tag: str) -> list[str]:
    """Give the launch's processes GRACE_S to end, kill those that do not; their command lines."""
    _, alive = psutil.wait_procs(_processes_of(tag), timeout=GRACE_S)
    left_running = [_command_line(each) for each in alive]
    if alive:
        stubborn = _processes_of(tag)  # asked again: they may have had children
        for each in stubborn:
            _signal(each.kill)
        psutil.wait_procs(stubborn, timeout=GRACE_S)
    return left_running


def _processes_of(tag: str) -> list[psutil.Process]:
    """The running processes that carry this launch's tag: ours, whatever session or parent they have by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "(ended meanwhile)"


def _of_ranks(logs: Path, name: str) -> str:
    """What the ranks wrote, in the order of their numbers; torchrun makes LOGS/RUN/attempt_0/RANK/NAME."""
    return "".join(file.read_text() for file in sorted(logs.rglob(name), key=lambda file: int(file.parent.name)))


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
