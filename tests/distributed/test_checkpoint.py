"""Checkpoints of two ranks: FSDP2's shards, each rank's generators, one rank's full disk; then read by one rank."""

from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import checkpoint_worker as worker
from tests.launch import launch
from trainers.checkpoint import load, read_about, whole_checkpoints


def test_two_ranks_save_for_each_other_and_for_one(tmp_path: Path) -> None:
    done = launch([Path(worker.__file__), tmp_path], nproc=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    newest = whole_checkpoints(tmp_path)[-1]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ours, theirs = worker.learner(1, False), worker.learner(2, False)
        load(newest, read_about(newest), theirs, seed=0)
        pairs = zip(worker.whole_state(ours), worker.whole_state(theirs), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    finally:
        dist.destroy_process_group()
