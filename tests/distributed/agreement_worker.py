"""Runs in every rank: phases of made-up steps, one of them different on one rank; what was raised goes to OUT.

torchrun --nproc_per_node=2 agreement_worker.py OUT
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from rollout import init_world
from rollout.agreement import SLOTS, Agreement, RanksDisagree
from rollout.world import tensor_parallel_group

REQUESTS = [str(number) for number in range(6)]
STEPS = 40


@dataclass
class Update:
    request_ids: list[str]
    token_ids: np.ndarray
    logprobs: np.ndarray


class Group:
    """The agreement of the ranks, fed with steps that look like a rollout's."""

    def __init__(self) -> None:
        world = init_world()
        self.rank = world.rank
        groups = [tensor_parallel_group(world, world.size), tensor_parallel_group(world, world.size, timeout_s=3.0)]
        self.agreement = Agreement(*groups)

    def step(self, number: int, change: str | None = None) -> None:
        """Schedule and sample; `change` is what this rank does differently."""
        counts = dict.fromkeys(REQUESTS, 1)
        order: list[str] | None = REQUESTS
        positions = np.full(6, 100 + number)
        token_ids, logprobs = np.arange(6, dtype=np.int32) + 10 * number, np.full(6, -0.5, np.float32)
        if change == "token":
            token_ids[3] += 1
        if change == "logprob":
            logprobs[3] = np.nextafter(logprobs[3], np.float32(0.0))
        if change == "count":
            counts["4"], order = 2, None
        if change == "missing":
            del counts["4"]
            order = list(counts)
            positions, token_ids, logprobs = (np.delete(array, 4) for array in (positions, token_ids, logprobs))
        if change == "position":
            positions[2] += 1
        if change == "order":
            order = REQUESTS[::-1]
            counts = dict.fromkeys(order, 1)
        self.agreement.scheduled(counts, positions, order)
        self.agreement.sampled(Update(list(order or counts), token_ids, logprobs))


def phase(group: Group, change: str | None, at: int, steps: int = STEPS) -> dict:
    """One phase in which rank 1 makes `change` at a step: what was raised, and after how many steps."""
    done = 0
    try:
        for number in range(steps):
            group.step(number, change if group.rank == 1 and number == at else None)
            done += 1
        group.agreement.finish()
    except RanksDisagree as error:
        return {"message": str(error), "steps": done}
    return {"message": None, "steps": done}


def behind(group: Group) -> dict:
    """Rank 1 comes late to every step, with another token in one: who finds it tells the other."""
    if group.rank == 1:
        time.sleep(0.5)
    return phase(group, "token", at=5)


def silent(group: Group) -> dict:
    """Rank 1 does something else and then hangs."""
    start = time.perf_counter()
    found = phase(group, "token" if group.rank == 1 else None, at=3) if group.rank == 0 else {}
    if group.rank == 1:
        for number in range(STEPS):
            group.agreement.scheduled(dict.fromkeys(REQUESTS, 1), np.full(6, 100), REQUESTS)
            group.agreement._waiting.clear()
            group.agreement._write(number, 1, 12345)
        time.sleep(8.0)
    return found | {"seconds": time.perf_counter() - start}


def cost(group: Group, rows: int = 512, steps: int = 2000) -> float:
    """Seconds a step."""
    order = [str(number) for number in range(rows)]
    counts = dict.fromkeys(order, 1)
    positions = np.full(rows, 100)
    update = Update(order, np.zeros(rows, np.int32), np.zeros(rows, np.float32))
    start = time.perf_counter()
    for _ in range(steps):
        group.agreement.scheduled(counts, positions, order)
        group.agreement.sampled(update)
    seconds = time.perf_counter() - start
    group.agreement.finish()
    return seconds / steps


def main() -> None:
    out = Path(sys.argv[1])
    before = set(Path("/dev/shm").glob("rollout-agreement-*"))
    group = Group()
    found: dict = {
        "equal": [phase(group, None, 0) for _ in range(3)],
        "long": phase(group, None, 0, steps=SLOTS + 100),
        "cost": cost(group),
    }
    for change in ("token", "logprob", "count", "position", "missing", "order"):
        group = Group()
        phase(group, None, 0)  # steps are counted from the phase's beginning
        found[change] = phase(group, change, at=21)
    found["last"] = phase(Group(), "token", at=STEPS - 1)
    found["behind"] = behind(Group())
    found["silent"] = silent(Group())
    dist.barrier()
    found["named"] = [path.name for path in set(Path("/dev/shm").glob("rollout-agreement-*")) - before]
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
