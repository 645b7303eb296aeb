"""Which run a job belongs to that torchrun has started again: after a failure, or with other nodes than before.

A run's folder notes the torchrun processes that started its ranks. Those that outlived what happened start the ranks
again; so a folder that names one of them is this job's. TORCHELASTIC_RESTART_COUNT alone would not do: a node that
comes in place of a dead one counts from 0, as all do when the number of nodes changes.
"""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from rollout import machines_of_ranks, this_machine
from trainers.errors import ConfigError

FILE = "launchers.json"

Process = tuple[str, int, float]
"""Machine, number and start (seconds since 1970): one process of all there ever are."""


def find_restarted(directory: Path) -> Path | None:
    """The folder in `directory` of the run that this job goes on with; None if it was not restarted. A collective.

    Raises:
        ConfigError: on every rank, if other nodes have the folder and rank 0's has not.
    """
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (_launcher(), _process(os.getpid())))
    launchers = {launcher for launcher, _ in everyones if launcher is not None}
    found: list[Any] = [None] * len(everyones)
    dist.all_gather_object(found, _find(directory, launchers, {process for _, process in everyones}))
    if found[0] is None and any(found):
        rank, folder = next((rank, folder) for rank, folder in enumerate(found) if folder is not None)
        machines = machines_of_ranks()
        raise ConfigError(
            f"torchrun has started this job again, and its run's folder {folder} is on {machines[rank].name} "
            f"(rank {rank}) but not on {machines[0].name} (rank 0): set run.directory to a folder that all nodes mount"
        )
    return found[0]


def note_launchers(folder: Path) -> None:
    """Write down who started this job's ranks; rank 0 writes. A collective."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (_launcher(), _process(os.getpid())))
    launchers = sorted({launcher for launcher, _ in everyones if launcher is not None})
    if dist.get_rank() == 0 and launchers:
        part = folder / f"{FILE}.part"
        part.write_text(json.dumps({"launchers": launchers, "ranks": [process for _, process in everyones]}) + "\n")
        part.rename(folder / FILE)


def restart_notes(every: int | None) -> list[str]:
    """What is to be said at the start of a job that torchrun was told to start again when it fails.

    Args:
        every: checkpoint.every.
    """
    notes: list[str] = []
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return notes
    if every is None:
        notes.append("torchrun may start this job again, and checkpoint.every is null: it would begin at step 0")
    several = len({machine.key for machine in machines_of_ranks()}) > 1
    if several and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        notes.append(
            "torchrun cannot replace a node that dies while TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is not set on all "
            "nodes (docs/multi-node.md)"
        )
    return notes


def _launcher() -> Process | None:
    """The torchrun that started this rank; None without one."""
    return _process(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None


def _process(pid: int) -> Process:
    return this_machine().key, pid, psutil.Process(pid).create_time()


def _find(directory: Path, launchers: set[Process], ranks: set[Process]) -> Path | None:
    """The folder that names one of the launchers, and none of the ranks: those began another run before."""
    if not launchers:
        return None
    for file in sorted(directory.glob(f"*/{FILE}")):
        try:
            noted = json.loads(file.read_text())
            known = {tuple(each) for each in noted["launchers"]}
            before = {tuple(each) for each in noted["ranks"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if known & launchers and not before & ranks:
            return file.parent
    return None
