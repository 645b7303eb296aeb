"""The launcher of the tests tells the truth: ranks, exit codes, output, and nothing left behind."""

import time

import psutil
import pytest

from tests.launch import TAG, launch


def script(tmp_path, text: str):
    path = tmp_path / "job.py"
    path.write_text(text)
    return path


def runs(pid: int) -> bool:
    """Whether a process runs: one that has ended may keep its number until its parent asks how it ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_ranks_see_each_other(tmp_path):
    job = script(
        tmp_path,
        "import os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor(10.0 + dist.get_rank())\n"
        "dist.all_reduce(total)\n"
        "print(f'rank {dist.get_rank()} total {total.item()} {sys.argv[1]} {os.environ[\"OMP_NUM_THREADS\"]}')\n"
        "dist.destroy_process_group()\n",
    )
    done = launch([job, "word"])
    assert done.returncode == 0, done.stderr
    # 10 + 11 = 21
    assert sorted(done.stdout.splitlines()) == ["rank 0 total 21.0 word 1", "rank 1 total 21.0 word 1"]
    assert done.left_running == []


def test_a_plain_process_is_outside_torchrun(tmp_path):
    job = script(tmp_path, "import os\nprint('RANK' in os.environ, os.environ['EXTRA'])\nraise SystemExit(3)\n")
    done = launch(job, nproc=None, env={"EXTRA": "yes"})
    assert (done.returncode, done.stdout) == (3, "False yes\n")


def test_a_failing_rank_gives_its_traceback(tmp_path):
    job = script(tmp_path, "import os\nif os.environ['RANK'] == '1':\n    raise RuntimeError('rank one is unwell')\n")
    done = launch(job)
    assert done.returncode == 1
    assert "RuntimeError: rank one is unwell" in done.stderr


def test_what_outlives_the_script_is_named_and_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.launch.GRACE_S", 1.0)
    job = script(
        tmp_path,
        "import subprocess, sys\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "print(subprocess.Popen(command, start_new_session=True).pid)\n",
    )
    done = launch(job, nproc=None)
    assert done.returncode == 0
    assert len(done.left_running) == 1 and "time.sleep(60)" in done.left_running[0]
    assert done.seconds < 10
    assert not runs(int(done.stdout))


def test_a_hanging_job_is_ended_with_all_its_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.launch.GRACE_S", 1.0)
    job = script(
        tmp_path,
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"print('tag', os.environ['{TAG}'], 'pid', os.getpid(), flush=True)\n"
        "time.sleep(600)\n",
    )
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="was not done after 12") as caught:
        launch(job, timeout_s=12)
    assert time.monotonic() - start < 25
    pids = [int(line.split()[-1]) for line in str(caught.value).splitlines() if line.startswith("tag")]
    assert len(pids) == 2  # both ranks had started, and their output is in the message
    assert not any(runs(pid) for pid in pids)
