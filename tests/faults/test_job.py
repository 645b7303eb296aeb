"""scripts/ppo.py with a real engine on two ranks, broken on purpose: each fault ends as designed, soon, and cleanly.

`make faults` breaks everything on each rank in turn and prints the table; `make test` takes the faults of QUICK.
"""

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.conftest import Row
from tests.launch import Completed, launch

JOB = Path(__file__).with_name("job.py")
SHARED_MEMORY, TEMPORARY = Path("/dev/shm"), Path(tempfile.gettempdir())
STALL_S = 8.0
END_S = 15.0  # of any fault but a stall
STEP = 1
CONFIG = [
    "configs/smoke.yaml",
    "sampling.max_tokens=24",
    "sampling.ignore_eos=true",
    "sampling.top_k=20",  # the tokens are drawn on each rank
    "ppo.steps=3",
    f"rollout.stall_timeout_s={STALL_S:g}",
    "run.name=run",
]

PLANTED = ("execute", "sample", "schedule", "weight copy", "reward", "backward")
STOPPED = r"Stalled: rank RANK gave no sign of life for \d+ s: process \d+ on \S+ is stopped, or hangs in code"
# What failure.json says; None where nobody is left to write it.
SAYS: dict[str, str | None] = {
    **{f"exception in {where}": f"PlantedError: {where}" for where in PLANTED},
    "SIGKILL of the rank": None,
    "SIGSTOP of the rank": STOPPED,
    "SIGTERM of the rank": None,
    "SIGKILL of the launcher": None,
    "SIGTERM of the launcher": None,
    "Ctrl-C": "KeyboardInterrupt: ",
    "SIGKILL of everybody": None,
    "sys.exit(0) in reward": "SystemExit: 0",
    "out of memory": r"RuntimeError: .*can't allocate memory",
    "step that never ends": r"Stalled: rank \d made no progress for \d+ s while generating",
    "reward that never returns": r"Stalled: rank \d made no progress for \d+ s while in phase",
    "reward that holds the interpreter": STOPPED,
    "data worker that dies": r"RuntimeError: DataLoader worker \(pid\(?s?\)? [\d, ]+\)",
    "NaN logits": r"FloatingPointError: token \d+ of sequence \d has the log-prob nan",
    "flipped token": r"RanksDisagree: .*: step 5 of the phase, request 3: token \d+ with .* on rank 0, token \d+",
    "skipped step": r"RanksDisagree: .*: step 5 of the phase, request \d: a token at position \d+ on rank 0, ",
    "dropped request": r"RanksDisagree: .*: step 4 of the phase, request 3: (no token|token \d+ with .*) on rank 0, ",
    "another seed": r"RanksDisagree: .*: step 0 of the phase, request \d: token \d+ with .* on rank 0, token \d+",
    "another config": r"ValueError: rank 1 builds its engine from .* pass the same on every rank",
    "full disk": r"SafetensorError: .*File too large",
}
STALLS = (
    "SIGSTOP of the rank",
    "step that never ends",
    "reward that never returns",
    "reward that holds the interpreter",
)
ONLY_RANK_0 = ("full disk", "SIGKILL of everybody", "SIGKILL of the launcher", "SIGTERM of the launcher", "Ctrl-C")
WHOLE_STEPS = {"another config": 0, "full disk": 3}  # elsewhere as many as before the fault
QUICK = {
    ("dropped request", 1),
    ("exception in reward", 1),
}
CASES = [
    pytest.param(fault, rank, marks=() if (fault, rank) in QUICK else pytest.mark.slow, id=f"{fault}, rank {rank}")
    for fault in SAYS
    for rank in (0, 1)
    if rank == 0 or fault not in ONLY_RANK_0
]


def run(model: Path, out: Path, fault: str, rank: int = 0) -> Completed:
    out.mkdir(exist_ok=True)
    settings = [*CONFIG, f"model.path={model}", f"run.directory={out}"]
    return launch([JOB, fault, str(rank), str(STEP), out, *settings], nproc=2, timeout_s=150)


def outside() -> set[Path]:
    """What jobs leave behind outside their runs' folders: shared memory, sockets, locks that no process holds."""
    found = {*SHARED_MEMORY.iterdir(), *TEMPORARY.glob("*-*-*-*-*"), *TEMPORARY.glob("*.lock")}
    sockets = Path("/proc/net/unix").read_text()
    return {path for path in found if str(path) not in sockets and not is_mapped(path)}


def left_by(jobs: Sequence[Completed], before: set[Path]) -> list[str]:
    """Processes that outlived their jobs, and what is outside that was not there before."""
    return [line for done in jobs for line in done.left_running] + [path.name for path in sorted(outside() - before)]


def named(left: list[str]) -> str:
    return ", ".join(left) or "nothing"


def is_mapped(path: Path) -> bool:
    """True for the shared memory of a job that runs beside this one."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


@pytest.mark.parametrize(("fault", "rank"), CASES)
def test_it_ends_as_designed(fault: str, rank: int, tiny_model_path: Path, tmp_path: Path, table: list[Row]) -> None:
    before = outside()
    done = run(tiny_model_path, tmp_path, fault, rank)
    ended = time.time()
    assert (tmp_path / "fault").exists(), done.stderr[-4000:]
    seconds = ended - float((tmp_path / "fault").read_text())
    left = left_by([done], before)
    story = tmp_path / "run" / "failure.json"
    failure = json.loads(story.read_text()) if story.exists() else None
    said = failure["error"].splitlines()[0] if failure else "nobody was left to tell"
    table.append(Row(fault, rank, f"{done.returncode}: {said[:100]}", seconds, named(left)))

    assert done.returncode != 0
    assert left == []
    assert seconds < (STALL_S + 10.0 if fault in STALLS else END_S)
    if (expected := SAYS[fault]) is not None:
        assert failure is not None, done.stderr[-4000:]
        assert re.match(expected.replace("RANK", str(rank)), failure["error"], re.DOTALL), failure["error"]
        assert failure["error"].splitlines()[0] in done.stderr, "on the console, too"
        assert set(failure["stacks"]) == {"0", "1"}
        if expected.startswith("PlantedError"):
            assert failure["rank"] == rank
            assert "raise PlantedError(where)" in failure["traceback"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    steps = [json.loads(row)["step"] for row in metrics.read_text().splitlines()] if metrics.exists() else []
    assert steps == list(range(WHOLE_STEPS.get(fault, STEP))), "every whole step, and no part of another"


@pytest.mark.slow
def test_a_start_beside_what_a_killed_job_left(tiny_model_path: Path, tmp_path: Path, table: list[Row]) -> None:
    before = outside()
    run(tiny_model_path, tmp_path / "killed", "SIGKILL of everybody")
    done = run(tiny_model_path, tmp_path / "next", "none")
    left = left_by([done], before)
    row = Row("start beside a killed job's leftovers", None, f"{done.returncode}", done.seconds, named(left))
    table.append(row)
    assert done.returncode == 0, done.stderr[-4000:]
    assert left == []


@pytest.mark.slow
def test_two_jobs_on_one_host_at_the_same_time(tiny_model_path: Path, tmp_path: Path, table: list[Row]) -> None:
    before = outside()
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path / "one", tmp_path / "two"]
        jobs = list(pool.map(lambda folder: run(tiny_model_path, folder, "none"), folders))
    codes = [done.returncode for done in jobs]
    left = left_by(jobs, before)
    table.append(Row("two jobs at the same time", None, f"{codes}", max(done.seconds for done in jobs), named(left)))
    assert codes == [0, 0], jobs[0].stderr[-2000:] + jobs[1].stderr[-2000:]
    assert left == []
    samples = [(folder / "run" / "samples.jsonl").read_text() for folder in folders]
    assert samples[0] == samples[1], "neither heard anything of the other"


def test_every_fault_that_can_be_planted_is_planted() -> None:
    planted = re.findall(r'^    "([^"]+)": lambda', JOB.read_text(), re.MULTILINE)
    assert {*planted} == {*SAYS, "none"}
    assert len(CASES) >= 20
