"""A checkpoint is there in full or not at all, is read without running anything, and brings everything back."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainers import checkpoint as module
from trainers.checkpoint import (
    ABOUT_FILE,
    CARRIED_FILE,
    RANDOM_FILE,
    TENSORS,
    About,
    CheckpointError,
    load,
    read_about,
    remove_leftovers,
    save,
    whole_checkpoints,
)
from trainers.errors import ConfigError
from trainers.random_state import derive_random_state, random_state, set_random_state


class Tied(nn.Module):
    """As a language model with a tied head: one weight under two names; and a number without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids)) * self.scale


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def learner(seed: int = 0, updates: int = 0, width: int = 8, scaler: Any = None) -> Any:
    torch.manual_seed(seed)
    policy = Tied()
    if width != 8:
        policy.embedding = nn.Embedding(50, width)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}], lr=0.01)
    made = SimpleNamespace(policy=policy, optimizer=optimizer, accelerator=SimpleNamespace(scaler=scaler))
    for _ in range(updates):
        update(made)
    return made


def update(made: Any) -> None:
    made.policy(torch.arange(50)).logsumexp(-1).mean().backward()
    made.optimizer.step()
    made.optimizer.zero_grad()


def about(step: int, **changes: Any) -> About:
    given = {"position": step * 8, "world_size": 1, "algorithm": "ppo", "config": {}, "origin": {}} | changes
    return About(step=step, **given)


def saved(folder: Path, step: int, made: Any = None, keep: int = 2) -> Path:
    return save(folder, about(step), made or learner(step, updates=step), keep, private=True)


def state_of(made: Any) -> list[torch.Tensor]:
    of_optimizer = [made.optimizer.state[p] for p in made.policy.parameters()]
    moments = [state[name] for state in of_optimizer for name in ("exp_avg", "exp_avg_sq", "step")]
    return [*made.policy.state_dict().values(), *moments]


def same(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state_of(ours), state_of(theirs), strict=True))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


# --- what comes back


def test_policy_optimizer_and_generators_come_back(tmp_path):
    ours = learner(1, updates=3)
    ours.policy.seen += 7
    folder = save(tmp_path, about(3, wandb_id="abc", origin={"model.path": "x"}), ours, 2, private=True)
    drawn = random.random(), np.random.rand(), torch.rand(1)

    theirs = learner(2)
    told = read_about(folder)
    load(folder, told, theirs, seed=0)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert same(ours, theirs)
    assert theirs.policy.head.weight is theirs.policy.embedding.weight
    assert (told.step, told.position, told.wandb_id, told.origin) == (3, 24, "abc", {"model.path": "x"})
    assert [group["lr"] for group in theirs.optimizer.param_groups] == [0.01, 0.1]
    update(ours), update(theirs)
    assert same(ours, theirs)


def test_saving_changes_nothing(tmp_path):
    one, other = learner(1, updates=2), learner(1, updates=2)
    before = random_state()
    saved(tmp_path, 2, one)
    assert random_state() == before
    update(one), update(other)
    assert same(one, other)


def test_an_optimizer_without_an_update_stays_so(tmp_path):
    """As after steps that found nothing to train on: a state made for the checkpoint would count as an update."""
    ours, theirs = learner(1), learner(2)
    folder = saved(tmp_path, 1, ours)
    load(folder, read_about(folder), theirs, seed=0)
    assert not ours.optimizer.state and not theirs.optimizer.state
    update(ours), update(theirs)
    assert same(ours, theirs)


def test_the_scaler_of_fp16_comes_back(tmp_path):
    ours = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    ours.scale(torch.ones(1))
    folder = saved(tmp_path, 1, learner(scaler=ours, updates=1))
    theirs = torch.amp.GradScaler("cpu")
    theirs.scale(torch.ones(1))
    load(folder, read_about(folder), learner(scaler=theirs), seed=0)
    assert theirs.state_dict() == ours.state_dict()


def test_large_states_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 2000)
    ours, theirs = learner(1, updates=2), learner(2)
    folder = saved(tmp_path, 2, ours)
    assert len(read_about(folder).files) == 3  # the weight and its two moments, 1600 bytes each
    load(folder, read_about(folder), theirs, seed=0)
    assert same(ours, theirs)


def test_a_rank_that_was_not_there_gets_generators_of_its_own():
    def drawn(*arguments: int) -> tuple[float, float, float]:
        derive_random_state(*arguments)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert drawn(0, 3, 1) == drawn(0, 3, 1)
    draws = [drawn(0, 3, 1), drawn(0, 3, 2), drawn(0, 4, 1), drawn(1, 3, 1)]
    assert len({number for draw in draws for number in draw}) == 12


def test_generators_survive_json():
    random.gauss(0, 1), np.random.randn()  # both keep the second of a pair
    state = json.loads(json.dumps(random_state()))
    drawn = random.gauss(0, 1), np.random.randn(), torch.randn(1)
    set_random_state(state)
    assert (random.gauss(0, 1), np.random.randn(), torch.randn(1)) == drawn


# --- whole or not at all


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        saved(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-000003", "step-000004", "step-000005"]
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == names(tmp_path)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        saved(tmp_path, step, learner())
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]


@pytest.mark.parametrize(("private", "mode"), [(True, 0o700), (False, 0o750)])
def test_who_may_look_into_it(private, mode, tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, about(1), learner(updates=1), 2, private)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert stat.S_IMODE(folder.parent.stat().st_mode) == mode


class Killed(BaseException):
    """Nothing here cleans up after an exception, so that the disk is left as a kill would leave it."""


STOPS = [(os, "fsync"), (Path, "rename"), (shutil, "rmtree"), (Path, "open")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("owner", "name"), STOPS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_stopped_at_any_point_the_checkpoints_are_whole(owner, name, when, tmp_path, monkeypatch):
    function, calls, stop_at = getattr(owner, name), [0], 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == stop_at and when == "before":
            raise Killed
        result = function(*args, **kwargs)
        if calls[0] == stop_at:
            raise Killed
        return result

    for attempt in range(1, 20):
        run = tmp_path / str(attempt)
        saved(run_folder(run), 1), saved(run, 2)
        calls[0], stop_at = 0, attempt
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            try:
                saved(run, 3)
            except (Killed, CheckpointError):
                pass
            else:
                break
        assert "step-000002" in names(run) and len(whole_checkpoints(run)) >= 2
        for folder in whole_checkpoints(run):
            loaded = learner(9)
            load(folder, read_about(folder), loaded, seed=0)
            step = read_about(folder).step
            assert same(loaded, learner(step, updates=step))
        remove_leftovers(run)
        assert all(not each.endswith(".part") for each in names(run))
        saved(run, 4)
        assert len(names(run)) == 2 and names(run)[-1] == "step-000004"
    assert attempt > 1, f"{name} was never called"


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as in tests/faults: the write fails
    try:
        with pytest.raises(CheckpointError) as error:
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for words in ("step-000002 was not written: rank 0: OSError: [Errno 27] File too large", "make room on the disk"):
        assert words in str(error.value)
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == ["step-000001"]
    saved(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_kill_in_the_middle_leaves_the_checkpoint_before(tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch.distributed as dist
from pathlib import Path
from tests.unit.test_checkpoint import saved
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
saved(Path({str(tmp_path)!r}), 1)
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
saved(Path({str(tmp_path)!r}), 2)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert names(tmp_path) == ["step-000001", "step-000002.part"]
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == ["step-000001"]
    loaded = learner(9)
    load(tmp_path / "checkpoints" / "step-000001", read_about(whole_checkpoints(tmp_path)[0]), loaded, seed=0)
    assert same(loaded, learner(1, updates=1))


# --- nothing that is read runs code


class Payload:
    def __init__(self, out: Path) -> None:
        self.out = out

    def __reduce__(self) -> Any:
        return Path.touch, (self.out,)


def test_json_and_safetensors_and_nothing_else(tmp_path):
    folder = saved(tmp_path, 1)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {ABOUT_FILE, RANDOM_FILE}
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".json":
            json.loads(content)
        else:
            length = int.from_bytes(content[:8], "little")
            assert file.suffix == ".safetensors" and isinstance(json.loads(content[8 : 8 + length]), dict)
        # A pickle of any protocol since 2 begins with these; torch's own files are zip archives.
        assert not content.startswith((b"\x80", b"PK"))
        with pytest.raises(Exception):  # noqa: B017
            pickle.loads(content)


@pytest.mark.parametrize("where", [".metadata", "tensors/.metadata", ABOUT_FILE, RANDOM_FILE, "tensors/SHARD"])
def test_a_hostile_file_runs_nothing(where, tmp_path):
    folder = saved(tmp_path, 1)
    (shard,) = (folder / TENSORS).iterdir()
    victim = folder / where.replace("SHARD", shard.name)
    content = pickle.dumps(Payload(tmp_path / "it ran"))
    size = victim.stat().st_size if victim.exists() else len(content)
    victim.write_bytes(content.ljust(size, b"\0"))
    try:
        load(folder, read_about(folder), learner(), seed=0)
    except ConfigError as error:
        assert "cannot be read" in str(error) and "checkpoint.resume=" in str(error)
        assert "metadata" not in where
    else:
        assert "metadata" in where
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "has the format 2"),
        ({"step": "1"}, "step has the wrong type"),
        ({"step": -1}, "a number is out of range"),
        ({"world_size": 0}, "a number is out of range"),
        ({"config": []}, "config has the wrong type"),
        ({"files": {}}, "it names no files"),
        ({"files": {"../../x.safetensors": 1}}, "is no file of tensors"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_it_says_of_itself_is_checked(changes, words, tmp_path):
    file = saved(tmp_path, 1) / ABOUT_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=words):
        read_about(file.parent)
    assert whole_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"python": [3, [1], None], "numpy": {"state": {"key": [1], "pos": 0}}, "torch": ""},
        {"python": 1},
        "text",
        None,
    ],
)
def test_generators_of_another_form_are_refused(state, tmp_path):
    folder = saved(tmp_path, 1)
    (folder / RANDOM_FILE).write_text(json.dumps({"0": state}))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(folder, read_about(folder), learner(), seed=0)


def test_a_file_that_was_cut_is_not_whole(tmp_path):
    folder = saved(tmp_path, 1)
    (shard,) = (folder / TENSORS).iterdir()
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ConfigError, match="is cut short"):
        read_about(folder)
    assert whole_checkpoints(tmp_path) == []


def test_what_is_carried_lies_beside_the_tensors_and_has_to_be_whole(tmp_path):
    folder = save(tmp_path, about(1), learner(updates=1), 2, True, carried=b"rows")
    assert read_about(folder).carried == 4 and (folder / CARRIED_FILE).read_bytes() == b"rows"
    (folder / CARRIED_FILE).write_bytes(b"row")
    with pytest.raises(ConfigError, match="carried.safetensors is cut short"):
        read_about(folder)
    (folder / CARRIED_FILE).unlink()
    with pytest.raises(ConfigError, match="carried.safetensors"):
        read_about(folder)
    assert not (save(tmp_path, about(2), learner(updates=1), 2, True) / CARRIED_FILE).exists()


def test_another_models_tensors_are_refused(tmp_path):
    folder = saved(tmp_path, 1)
    with pytest.raises(ConfigError, match="damaged or of another model: rank 0: ValueError: Size mismatch"):
        load(folder, read_about(folder), learner(width=16), seed=0)
