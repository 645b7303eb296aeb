"""The processes of a benchmark: turns are answered, deaths and hangs are told, and nobody outlives the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scripts.bench import turns
from scripts.bench.plan import Settings
from scripts.bench.turns import SystemDied, running

WORKER = "tests.distributed.bench_worker"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "WORKER_MODULE", WORKER)


def settings(system: str, nproc: int = 1) -> Settings:
    return Settings(system, "model", "prompts.jsonl", nproc, 8, 16, 64, 4, largest_batch=4)


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_two_systems_answer_in_turn_and_end(tmp_path: Path) -> None:
    both = [settings("stock_sync", nproc=2), settings("ours_async")]
    with running(both, tmp_path, timeout_s=60) as systems:
        assert [said["world_size"] for _, said in systems.values()] == [2, 1]
        for repeat in range(2):
            for number, (system, _) in enumerate(systems.values()):
                assert system.take(do="add", values=[repeat, 10 * number]) == {"sum": repeat + 10 * number}
        pids = [said["pid"] for _, said in systems.values()]
        assert not any(map(ended, pids))
    assert all(map(ended, pids))
    assert all(system._process.returncode == 0 for system, _ in systems.values())  # left by themselves


def test_a_death_is_told_with_exit_code_and_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemDied, match=r"ours_sync ended with exit code 1\n(.|\n)*the last words of rank 0") as told,
        running([settings("ours_sync"), settings("ours_async")], tmp_path, timeout_s=60) as systems,
    ):
        other = systems["ours_async"][1]["pid"]
        systems["ours_sync"][0].take(do="die")
    assert str(tmp_path / "ours_sync") in str(told.value)
    assert "exitcode  : 7" in str(told.value)  # of the rank, in torchrun's report
    assert ended(other)


def test_a_hang_is_told_and_ended(tmp_path: Path) -> None:
    with running([settings("ours_sync")], tmp_path, timeout_s=60) as systems:
        system, said = systems["ours_sync"]
        system.timeout_s = 1.0
        with pytest.raises(SystemDied, match="ours_sync gave no answer within 1 s"):
            system.take(do="hang")
        system.close(at_once=True)
        assert ended(said["pid"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)])
def test_systems_end_with_their_parent(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C, after which the parent ends them; and SIGKILL, after which the end of the pipe tells them."""
    parent = (
        "import signal, sys, time; from pathlib import Path; from scripts.bench import turns\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job of a shell\n"
        "from tests.distributed.test_bench_turns import settings\n"
        f"turns.WORKER_MODULE = {WORKER!r}\n"
        "with turns.running([settings('ours_sync')], Path(sys.argv[1]), 60) as systems:\n"
        "    print(systems['ours_sync'][1]['pid'], flush=True); time.sleep(3600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path / "systems")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        torchrun = psutil.Process(pid).ppid()
        process.send_signal(number)
        returned = process.wait(60)
        assert returned == code or (number == signal.SIGINT and returned == -signal.SIGINT)
        assert wait_for(lambda: ended(pid) and ended(torchrun))
    finally:
        process.kill()
