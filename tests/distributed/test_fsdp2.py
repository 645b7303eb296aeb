"""FSDP2 gives what DDP gives: metrics, weights and moments of three steps; and goes on from DDP's checkpoints."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from tests.distributed import fsdp2_worker as worker
from tests.launch import launch
from trainers.checkpoint import load, read_about

# PPO is in float32, GRPO under bfloat16: either way only sums over the ranks are made in another order.
METRICS = dict(rel=1e-5, abs=1e-6)
STATES = dict(rtol=2e-6, atol=2e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fsdp2")
    done = launch([Path(worker.__file__), made], nproc=2, timeout_s=200)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.left_running == []
    return made


@pytest.fixture(scope="module")
def of_ranks(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("case", worker.CASES)
def test_steps_in_shards_are_those_of_ddp(case: str, of_ranks: list[dict]) -> None:
    for rank in of_ranks:
        ddp, fsdp2 = rank[f"{case} ddp"], rank[f"{case} fsdp2"]
        for ours, expected in zip(fsdp2["metrics"], ddp["metrics"], strict=True):
            assert ours.keys() == expected.keys()
            for name, value in ours.items():
                assert value == pytest.approx(expected[name], **METRICS), name
        assert ddp["metrics"][0]["train/logprob_gap_max"] == fsdp2["metrics"][0]["train/logprob_gap_max"]
        close(fsdp2["state"], ddp["state"], **STATES)
        close(fsdp2["exported"], ddp["exported"], rtol=2**-7, atol=1e-6)
    for exported in (of_ranks[0][f"{case} {sharding}"]["exported"] for sharding in ("ddp", "fsdp2")):
        if case != "lora":  # merged weights come once
            assert exported["lm_head.weight"].data_ptr() == exported["model.embed_tokens.weight"].data_ptr(), "tied"


def test_a_run_goes_from_whole_to_shards_and_back(of_ranks: list[dict]) -> None:
    for rank in of_ranks:
        close(rank["ppo handed on"]["state"], rank["ppo ddp"]["state"], **STATES)


def test_one_rank_goes_on_where_two_in_shards_stopped(folder: Path, of_ranks: list[dict]) -> None:
    """Loaded whole and in shards of one, bit for bit the same."""
    where = folder / "run-ppo" / "checkpoints" / "step-000002"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        states = []
        for sharding in ("ddp", "fsdp2"):
            learner = worker.fresh("ppo", folder, sharding)
            load(where, read_about(where), learner, seed=0)
            states.append(worker.state(learner))
        close(states[0], states[1], rtol=0, atol=0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        dist.destroy_process_group()
