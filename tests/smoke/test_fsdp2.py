"""Whole runs with the policy in shards: the metrics of DDP, and an engine that holds what was trained."""

import json
import os
from pathlib import Path

import pytest

from tests.launch import launch
from tests.smoke import checked_worker

WORKER = Path(checked_worker.__file__)
SIZE = ["rollout.max_model_len=64", "rollout.max_num_seqs=8", "rollout.kv_cache_gib=0.25", "sampling.max_tokens=8"]
SIZE += ["rollout.enforce_eager=true", "rollout.dtype=float32", "run.progress=false", "wandb.mode=disabled"]
OF = {
    "grpo": [
        "grpo.kl_coef=0.01",
        "sampling.n=4",
        "grpo.prompts_per_step=4",
        "grpo.micro_batch_tokens=64",
        "grpo.steps=2",
    ],
    "ppo": [
        "ppo.critic=MODEL",
        "ppo.prompts_per_step=8",
        "ppo.micro_batch_tokens=64",
        "ppo.steps=2",
        "ppo.kl_coef=0.01",
    ],
}
MEASURED = ("phase/", "memory/", "step/", "sync/", "rollout/")


def rows(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not measured(name)} for row in found]


def measured(name: str) -> bool:
    return name.startswith(MEASURED) or name.endswith(("_per_s", "seconds", "_ms"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("algorithm", OF)
def test_a_run_in_shards_is_that_of_ddp(algorithm: str, tiny_model_path: Path, tmp_path: Path) -> None:
    """In float32, so that both sample the same tokens; the last step's update is in the exported policy."""
    for sharding in ("ddp", "fsdp2"):
        words = [word.replace("MODEL", str(tiny_model_path)) for word in OF[algorithm]]
        words += [f"model.path={tiny_model_path}", f"run.directory={tmp_path}", f"run.name={sharding}"]
        words += [f"model.sharding={sharding}", "model.autocast=no", "optimizer.learning_rate=1e-4", *SIZE]
        done = launch([WORKER, algorithm, *words], nproc=2, timeout_s=300)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.left_running == []
        assert done.stdout.count("checked version") == 4, done.stdout  # two ranks, two steps
    ddp, fsdp2 = rows(tmp_path / "ddp"), rows(tmp_path / "fsdp2")
    assert len(ddp) == 2
    for ours, expected in zip(fsdp2, ddp, strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)
    sizes = [os.path.getsize(tmp_path / sharding / "policy/model.safetensors") for sharding in ("ddp", "fsdp2")]
    assert sizes[0] == sizes[1]
