"""A job that torchrun starts again finds its run's folder; no other job does."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rollout import World
from rollout.world import Machine
from tests.unit.test_resume import EXAMPLES, WORLD, about_of, config_of, put_checkpoint
from trainers import nodes, restart
from trainers.config import CheckpointConfig, RunConfig
from trainers.errors import ConfigError
from trainers.nodes import check_groups, check_shared
from trainers.restart import FILE, find_restarted, restart_notes
from trainers.resume import agreed_start, origin_of, taken


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch):
    """Starts this rank: each time another process, of the launcher that is given by its number."""
    ranks = itertools.count(1)
    current = {}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(restart, "_process", lambda pid: ("here", *current[pid]))

    def start(launcher: int) -> None:
        current[os.getppid()], current[os.getpid()] = (launcher, 1.5), (next(ranks), 2.5)

    return start


def begun(config) -> Path:
    """A run, up to its first step."""
    start = agreed_start(config, EXAMPLES, WORLD)
    with taken(start, config, WORLD):
        return start.folder


@pytest.mark.parametrize(("name", "resume"), [("run", None), ("run", "auto"), (None, None)])
def test_a_restarted_job_goes_on_in_its_folder(name, resume, model, tmp_path, torchrun):
    config = config_of(model, tmp_path, resume, run=RunConfig(directory=str(tmp_path), name=name, progress=False))
    torchrun(launcher=7)
    folder = begun(config)
    for step in (2, 4):
        put_checkpoint(folder, about_of(config, step, origin=origin_of(config, EXAMPLES)))
    torchrun(launcher=7)
    start = agreed_start(config, EXAMPLES, WORLD)
    assert (start.folder, start.step, start.is_new) == (folder, 4, False)
    with taken(start, config, WORLD):
        pass


def test_before_its_first_checkpoint_it_starts_there_anew(model, tmp_path, torchrun):
    config = config_of(model, tmp_path)
    torchrun(launcher=7)
    folder = begun(config)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    torchrun(launcher=7)
    start = agreed_start(config, EXAMPLES, WORLD)
    assert (start.folder, start.step, start.is_new) == (folder, 0, False)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with pytest.raises(ConfigError, match="has 2 steps and no whole checkpoint"):
        agreed_start(config, EXAMPLES, WORLD)
    never = replace(config, checkpoint=CheckpointConfig())
    assert agreed_start(never, EXAMPLES, WORLD).step == 0, "one that writes none has nothing else"


def test_the_newest_checkpoint_counts_not_the_one_it_was_first_started_from(model, tmp_path, torchrun):
    config = config_of(model, tmp_path)
    torchrun(launcher=7)
    folder = begun(config)
    first = put_checkpoint(folder, about_of(config, 2, origin=origin_of(config, EXAMPLES)))
    again = config_of(model, tmp_path, resume=str(first))
    torchrun(launcher=8)
    assert agreed_start(again, EXAMPLES, WORLD).step == 2
    restart.note_launchers(folder)  # as `restore` does when the later ones are dropped
    put_checkpoint(folder, about_of(config, 6, origin=origin_of(config, EXAMPLES)))
    torchrun(launcher=8)
    assert agreed_start(again, EXAMPLES, WORLD).step == 6


def test_other_jobs_do_not_find_it(model, tmp_path, torchrun, monkeypatch):
    config = config_of(model, tmp_path, run=RunConfig(directory=str(tmp_path), progress=False))
    torchrun(launcher=7)
    folder = begun(config)
    assert find_restarted(tmp_path) is None, "the same processes: a second run of one script"
    torchrun(launcher=8)
    assert find_restarted(tmp_path) is None
    torchrun(launcher=7)
    assert find_restarted(tmp_path) == folder
    (folder / FILE).write_text('{"launchers": [["here", 7')
    assert find_restarted(tmp_path) is None
    (folder / FILE).write_text(json.dumps({"launchers": [["here", 7, 1.5]], "ranks": []}))
    assert find_restarted(tmp_path) == folder
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert find_restarted(tmp_path) is None, "without torchrun nobody starts it again"


def test_one_node_that_outlived_it_is_enough(model, tmp_path, torchrun, monkeypatch):
    """The other came in place of a dead one; and it may have become rank 0's."""
    config = config_of(model, tmp_path)
    torchrun(launcher=7)
    folder = begun(config)

    def of_two(everyones: list, ours: object) -> None:
        if isinstance(ours, tuple):
            everyones[:] = [(("there", 1, 9.0), ("there", 2, 9.0)), ours]
        else:
            everyones[:] = [found_by_new, ours]

    monkeypatch.setattr(restart.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(restart.dist, "all_gather_object", of_two)
    monkeypatch.setattr(restart, "machines_of_ranks", lambda: (Machine("new", "n"), Machine("old", "o")))
    torchrun(launcher=7)
    found_by_new = folder
    assert find_restarted(tmp_path) == folder
    found_by_new = None
    with pytest.raises(ConfigError, match=r"is on old \(rank 1\) but not on new \(rank 0\): set run.directory to"):
        find_restarted(tmp_path)


@pytest.mark.parametrize(
    ("restarts", "every", "shares", "nodes", "said"),
    [
        ("0", None, "True", 2, []),
        ("3", 1, "True", 1, []),
        ("3", 1, "False", 2, []),
        ("3", None, "True", 1, ["would begin at step 0"]),
        ("3", 1, "True", 2, ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]),
    ],
)
def test_what_a_job_that_may_be_restarted_is_told(restarts, every, shares, nodes, said, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shares)
    monkeypatch.setattr(restart, "machines_of_ranks", lambda: [Machine(str(node), str(node)) for node in range(nodes)])
    notes = restart_notes(every)
    assert len(notes) == len(said) and all(words in note for words, note in zip(said, notes, strict=True))


def test_it_is_said_at_the_start(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    run = RunConfig(directory=str(tmp_path), name="run")
    agreed_start(config_of(model, tmp_path, run=run, checkpoint=CheckpointConfig()), EXAMPLES, WORLD)
    assert "checkpoint.every is null: it would begin at step 0" in capsys.readouterr().err
    agreed_start(config_of(model, tmp_path, run=replace(run, name="other")), EXAMPLES, WORLD)
    assert capsys.readouterr().err == ""


# --- several machines

TWO = World(rank=0, local_rank=0, size=2, device=torch.device("cpu"))


@pytest.fixture
def two_nodes(monkeypatch):
    """This rank and one on another machine, which sees the files that are given."""
    sees = {"directory": True}
    monkeypatch.setattr(nodes, "machines_of_ranks", lambda: (Machine("a", "1"), Machine("b", "2")))
    monkeypatch.setattr(nodes, "SEEN_WITHIN_S", 0.0)

    def gather(everyones: list, ours: bool) -> None:
        everyones[:] = [ours, sees["directory"]]

    monkeypatch.setattr(nodes.dist, "all_gather_object", gather)
    return sees


def test_checkpoints_take_a_folder_that_all_nodes_see(model, tmp_path, two_nodes):
    directory = tmp_path / "runs"
    config = config_of(model, directory)
    check_shared(config, TWO)
    assert list(directory.iterdir()) == [], "the mark is gone"
    two_nodes["directory"] = False
    with pytest.raises(
        ConfigError, match=r"rank 1 on b does not see .*runs as it is on a: set run.directory to a fold"
    ):
        check_shared(config, TWO)
    assert list(directory.iterdir()) == []
    with pytest.raises(ConfigError, match=r"set checkpoint.resume to a folder"):
        check_shared(config_of(model, directory, resume=str(directory)), TWO)
    check_shared(replace(config, checkpoint=CheckpointConfig()), TWO)  # nothing is written there but by rank 0


def test_a_run_over_two_nodes_says_how_to_start(model, tmp_path, two_nodes):
    with pytest.raises(
        ConfigError, match=r"rollout.tensor_parallel_size is null, .*or set rollout.tensor_parallel_size=1"
    ):
        check_groups(config_of(model, tmp_path))
