"""A step's timeline has all ranks in one file on one clock, for the steps that were asked for and no others."""

import json
from pathlib import Path

import pytest

from tests.distributed import timeline_worker
from tests.distributed.timeline_worker import AHEAD_S
from tests.launch import launch
from tests.trace_format import check_format, check_nesting, spans_by_track

WORKER = Path(timeline_worker.__file__)
RANKS = range(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timeline")
    done = launch([WORKER, folder], nproc=len(RANKS), timeout_s=90)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def events(folder: Path) -> list[dict]:
    return json.loads((folder / "timeline" / "step-00003.json").read_text())["traceEvents"]


def test_only_the_steps_that_were_asked_for_are_written(folder: Path) -> None:
    assert sorted(file.name for file in (folder / "timeline").iterdir()) == ["step-00001.json", "step-00003.json"]


def test_every_rank_and_thread_is_there(events: list[dict]) -> None:
    check_format(events)
    check_nesting(events)
    main_thread = {"step 3", "sync", "reward", "optimize", "forward", "backward"}
    assert spans_by_track(events) == {
        (rank, track): names
        for rank in RANKS
        for track, names in [
            ("main thread", main_thread),
            ("execute thread", {"copy weights"}),
            ("reward worker 0", {"reward"}),
        ]
    }
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        f"rank {rank}" for rank in RANKS
    }


def test_what_the_ranks_do_together_stands_one_under_another(events: list[dict]) -> None:
    """All are in the barrier at once: the last one to come is there before the first one leaves."""
    of_ranks = [[e for e in events if e["name"] == "backward" and e["pid"] == rank] for rank in RANKS]
    for together in zip(*of_ranks, strict=True):
        assert max(each["ts"] for each in together) <= min(each["ts"] + each["dur"] for each in together)


def test_clocks_of_other_machines_are_found(folder: Path) -> None:
    """Rank 1 asks; rank 2, of the same machine, takes its answer."""
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in RANKS]
    assert [same_machine for same_machine, _ in found] == [0.0, 0.0, 0.0]
    assert found[0][1] == 0.0
    assert found[1][1] == found[2][1] == pytest.approx(AHEAD_S, abs=0.05)
