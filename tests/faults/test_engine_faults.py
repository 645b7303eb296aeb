"""A rank that goes wrong in a rollout: raises, hangs, or draws other tokens. Nobody waits for ever, nobody goes on."""

import json
import re
import tempfile
import time
from pathlib import Path

from tests.launch import Completed, launch

SHARED_MEMORY, TEMPORARY = Path("/dev/shm"), Path(tempfile.gettempdir())
WORKER = Path(__file__).with_name("engine_worker.py")


def run(model: Path, out: Path, how: str) -> tuple[Completed, float, dict]:
    """The launch, the seconds from the fault to the end of all ranks, and failure.json."""
    shared_memory, sockets = set(SHARED_MEMORY.iterdir()), set(TEMPORARY.glob("*-*-*-*-*"))
    done = launch([WORKER, model, out, how], nproc=2, timeout_s=150)
    seconds = time.time() - float((out / "start").read_text())
    assert "generated" not in done.stdout
    assert done.returncode == 1
    assert done.left_running == []
    assert set(SHARED_MEMORY.iterdir()) <= shared_memory
    assert set(TEMPORARY.glob("*-*-*-*-*")) <= sockets
    return done, seconds, json.loads((out / "failure.json").read_text())


def test_an_exception_on_one_execute_thread(tiny_model_path: Path, tmp_path: Path) -> None:
    done, seconds, failure = run(tiny_model_path, tmp_path, "raise")
    assert seconds < 10.0
    assert failure["rank"] == 1 and failure["error"] == "PlantedError: in execute-rank1"
    assert "in execute_model" in failure["traceback"], "the execute thread's own"
    assert "execute-rank0" in failure["stacks"]["0"], "rank 0 was in a step"
    assert "rank 0: ended, because rank 1 failed: PlantedError" in done.stderr


def test_a_step_that_never_ends(tiny_model_path: Path, tmp_path: Path) -> None:
    _, seconds, failure = run(tiny_model_path, tmp_path, "hang")
    assert seconds < 15.0 + 10.0
    assert "made no progress for" in failure["error"] and "while generating" in failure["error"]
    assert "in execute_model" in failure["stacks"]["1"]["execute-rank1"], "where it hangs"


def test_ranks_that_draw_other_tokens(tiny_model_path: Path, tmp_path: Path) -> None:
    done, _, failure = run(tiny_model_path, tmp_path, "seed")
    assert failure["error"].startswith("RanksDisagree")
    named = r"step 0 of the phase, request \d+: token (\d+) with log-prob \S+ on rank 0, token (\d+)"
    found = re.search(named, failure["error"])
    assert found and found[1] != found[2], failure["error"]


def test_ranks_with_different_configs_are_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    done, _, failure = run(tiny_model_path, tmp_path, "config")
    assert failure["error"].startswith("ValueError: rank 1 of the tensor-parallel group builds its engine from")
    assert "seed=1" in failure["error"] and "pass the same on every rank" in failure["error"]
