"""Whatever breaks on one rank ends all of them within ten seconds, and says what it was."""

import json
import time
from pathlib import Path

import psutil
import pytest

from tests.launch import Completed, launch

WORKER = Path(__file__).with_name("failure_worker.py")
END_S = 10.0


def run(folder: Path, how: str, meanwhile: str) -> tuple[Completed, float]:
    """The launch, and the seconds from the ranks' common start to the end of them all; rank 1 breaks at 1 s."""
    done = launch([WORKER, folder, how, meanwhile], nproc=2, timeout_s=90)
    return done, time.time() - float((folder / "start").read_text()) - 1.0


@pytest.mark.parametrize(
    "meanwhile",
    [
        "collective",
        "spin",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("backward", "data worker", "handler")),
    ],
)
def test_an_exception_ends_every_rank_whatever_it_does(tmp_path: Path, meanwhile: str) -> None:
    done, seconds = run(tmp_path, "exception", meanwhile)
    assert done.returncode == 1
    assert seconds < END_S
    assert done.left_running == []
    assert done.stderr.count("PlantedError: on the main thread") >= 1
    assert "in breaks" in done.stderr, "the traceback"
    assert "rank 0: ended, because rank 1 failed: PlantedError: on the main thread" in done.stderr
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["thread"]) == (1, "MainThread")
    assert failure["error"] == "PlantedError: on the main thread" and "in breaks" in failure["traceback"]
    assert set(failure["stacks"]) == {"0", "1"}
    assert "is_busy" in failure["stacks"]["0"]["MainThread"]


def test_an_exception_on_another_thread_counts_too(tmp_path: Path) -> None:
    done, seconds = run(tmp_path, "thread", "collective")
    assert done.returncode == 1 and seconds < END_S and done.left_running == []
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert (failure["rank"], failure["thread"]) == (1, "the-other")
    assert failure["error"] == "PlantedError: on another thread"
    assert "in breaks" in failure["stacks"]["1"]["MainThread"], "which waits for nobody knows what"


def test_a_rank_that_stands_still_is_a_failure(tmp_path: Path) -> None:
    done, seconds = run(tmp_path, "stall", "collective")
    assert done.returncode == 1 and done.left_running == []
    assert seconds < 2.0 + END_S
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["rank"] == 1 and "made no progress for" in failure["error"]
    assert "while standing still" in failure["error"] and "in breaks" in failure["traceback"]


def test_leaving_early_is_a_failure_though_the_exit_code_is_0(tmp_path: Path) -> None:
    done, seconds = run(tmp_path, "exit", "collective")
    assert done.returncode == 1 and seconds < END_S and done.left_running == []
    assert json.loads((tmp_path / "failure.json").read_text())["error"].startswith("SystemExit")


def test_a_failure_that_was_reported_is_one_whoever_catches_it(tmp_path: Path) -> None:
    done, seconds = run(tmp_path, "caught", "nothing")
    assert done.returncode == 1 and seconds < END_S and done.left_running == []
    assert json.loads((tmp_path / "failure.json").read_text())["error"] == "PlantedError: on the main thread"


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    done, seconds = run(tmp_path, "kill", "spin")
    assert done.returncode == 1 and seconds < END_S and done.left_running == []


@pytest.mark.parametrize("how", ["launcher", "launcher, nobody reads"])
def test_without_its_launcher_no_rank_goes_on(tmp_path: Path, how: str) -> None:
    done, seconds = run(tmp_path, how, "spin")
    assert done.returncode != 0 and seconds < 2 * END_S
    assert done.left_running == []
    for rank in range(2):
        pid = int((tmp_path / f"pid{rank}").read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_one_process_keeps_its_exception(tmp_path: Path) -> None:
    # A notebook must not be ended for what its user can see and mend.
    program = (
        "import sys\nfrom pathlib import Path\nfrom rollout import watched\n"
        f"try:\n    with watched(Path({str(tmp_path)!r})):\n        raise ValueError('mine')\n"
        "except ValueError:\n    import time; time.sleep(6.0); print('still here')\n"
    )
    script = tmp_path / "one.py"
    script.write_text(program)
    done = launch(script, nproc=None, timeout_s=60)
    assert done.returncode == 0 and "still here" in done.stdout
    assert json.loads((tmp_path / "failure.json").read_text())["error"] == "ValueError: mine"
