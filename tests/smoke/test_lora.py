"""Two GRPO steps with adapters: they alone train, the model without them is the reference, the merged one comes out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import launch

SIZE = ["rollout.max_model_len=64", "rollout.max_num_seqs=8", "rollout.kv_cache_gib=0.25", "sampling.max_tokens=8"]
SIZE += ["sampling.n=4", "grpo.prompts_per_step=4", "rollout.enforce_eager=true", "run.progress=false"]
LORA = ["lora.rank=4", "lora.alpha=8", "grpo.kl_coef=0.01", "optimizer.learning_rate=1e-2", "wandb.mode=disabled"]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the run, rewarded for what a random model does now and then."""
    directory = tmp_path_factory.mktemp("lora")
    (directory / "rewards.py").write_text("def length(response, answer, sample):\n    return len(response) % 7\n")
    words = [f"model.path={tiny_model_path}", f"run.directory={directory}", "run.name=run", "grpo.steps=2"]
    words += [f'reward.functions=["{directory}/rewards.py:length"]', "reward.require_finish=false"]
    done = launch(["scripts/grpo.py", *words, *SIZE, *LORA, "checkpoint.every=2"], nproc=2, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    return directory / "run"


def test_the_reference_is_the_policy_that_the_run_began_with(folder: Path) -> None:
    first, second = metrics(folder)
    assert first["train/kl_ref"] < 1e-6 < 1e-4 < second["train/kl_ref"]


def test_the_engine_samples_from_the_merged_policy(folder: Path) -> None:
    for row in metrics(folder):
        assert row["train/logprob_gap_mean"] < 0.06  # as in tests/engine/test_weights.py: a random model, bfloat16
        assert row["train/grad_norm"] > 0


def test_adapters_alone_train_and_come_out_merged(folder: Path, tiny_model_path: Path) -> None:
    before = {name: each.to(torch.bfloat16) for name, each in load_file(tiny_model_path / "model.safetensors").items()}
    after = load_file(folder / "policy" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name} and len(changed) == 2 * 7
    adapter = load_file(folder / "policy" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 7 and all(each.any() for each in adapter.values())
    (tensors,) = (folder / "checkpoints").glob("step-*/tensors")
    kept = [name for file in tensors.iterdir() for name in load_file(file) if name.startswith("policy.")]
    assert len(kept) == 2 * 2 * 7 and all("lora_" in name for name in kept)


@pytest.mark.slow
def test_the_engine_loads_what_came_out(folder: Path, tmp_path: Path) -> None:
    """The run goes on from it, in float32, where engine and trainer agree closely."""
    words = [f"model.path={folder / 'policy'}", f"run.directory={tmp_path}", "run.name=again", "grpo.steps=1"]
    words += [*SIZE, "grpo.kl_coef=0.01", "wandb.mode=disabled", "rollout.dtype=float32", "model.autocast=no"]
    done = launch(["scripts/grpo.py", *words], nproc=None, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = metrics(tmp_path / "again")
    assert row["train/logprob_gap_mean"] < 1e-4
