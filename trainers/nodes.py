"""What a job on several machines needs, checked before anything is loaded; collectives of all ranks."""

import time
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rollout import World, check_machines, machines_of_ranks
from trainers.checkpoint import on_main
from trainers.config import Experiment
from trainers.errors import ConfigError

COLLECTIVE_SLACK_S = 60.0
"""By which collectives outlast rollout.stall_timeout_s: the watch has the first word, since it knows who hangs."""
SEEN_WITHIN_S = 10.0  # what one node has written may take a moment to be seen on another: NFS keeps what it once read


def check_groups(config: Experiment) -> None:
    """See that each copy of the engine lies on one machine.

    Raises:
        ConfigError: on every rank, if not; says how to start instead.
    """
    try:
        check_machines(config.rollout.tensor_parallel_size, machines_of_ranks())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_shared(config: Experiment, world: World) -> None:
    """See that all machines of the job have the folder of the runs, if all ranks are to write checkpoints there.

    Raises:
        ConfigError: on every rank, if one does not see it; names it.
    """
    every, resume, machines = config.checkpoint.every, config.checkpoint.resume, machines_of_ranks()
    if every is None or len({machine.key for machine in machines}) == 1:
        return
    key = "run.directory" if resume in (None, "auto") else "checkpoint.resume"
    folder = Path(config.run.directory if key == "run.directory" else str(resume))
    name = [f".seen-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    mark = folder / name[0]

    def put() -> None:
        if key == "run.directory":
            folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            mark.touch()

    on_main(put)
    seen: list[Any] = [None] * world.size
    dist.all_gather_object(seen, _appears(mark))
    if world.is_main:
        mark.unlink(missing_ok=True)
    blind = [rank for rank in range(world.size) if not seen[rank]]
    if blind and seen[0]:
        raise ConfigError(
            f"checkpoint.every is {every}, and each rank writes its part of a checkpoint, but rank {blind[0]} on "
            f"{machines[blind[0]].name} does not see {folder} as it is on {machines[0].name}: set {key} to a folder "
            "that all nodes mount, or checkpoint.every=null"
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
