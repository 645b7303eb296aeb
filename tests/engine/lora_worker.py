"""Runs in every rank: syncs of a policy under LoRA adapters, beside syncs of the same policy merged by PEFT itself.

torchrun --nproc_per_node=2 lora_worker.py MODEL OUT DTYPE
"""

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import rollout.weights
from rollout import RolloutConfig, RolloutEngine, SamplingConfig, StaleWeights
from rollout.adapters import LoraWeight, Weight
from rollout.backend.weight_sync import fingerprint
from rollout.backend.worker import reload_policy_weights
from tests.engine.weights_worker import logprob_gap

SKIPPED = "model.layers.1.mlp.down_proj.weight"


def with_adapters(model: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | config)))


def train_a_little(policy: nn.Module, seed: int) -> None:
    """Other adapters, far from zero; the same on all ranks. The base stays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def merged_by_peft(policy: nn.Module) -> nn.Module:
    return copy.deepcopy(policy).merge_and_unload()


def held(engine: RolloutEngine) -> list[int]:
    return fingerprint(engine._core.executor.sync_layers())


def beside_a_merged_policy(engine: RolloutEngine, policy: nn.Module) -> dict[str, Any]:
    """Adapters of two seeds: what the engine holds after a sync of the merged policy, by the plan and by a reload."""
    found: dict[str, Any] = {"planned": [], "as_merged": [], "as_reloaded": [], "all": []}
    sync = engine._core.executor._sync()
    for seed in (1, 2):
        train_a_little(policy, seed)
        engine.sync_weights(merged_by_peft(policy), seed)
        expected = held(engine)
        found["all"].append(expected)
        engine.sync_weights(wiped(policy), seed)
        found["planned"].append(engine.sync_weights(policy, seed).planned)
        found["as_merged"].append(held(engine) == expected)
        engine.check_weights(policy)
        engine.sync_weights(wiped(policy), seed)
        whole = sync._whole(dict(rollout.weights.named_weights(policy)))
        engine._core.executor.thread.run(reload_policy_weights, sync._worker, whole)
        found["as_reloaded"].append(held(engine) == expected)
    return found


def wiped(policy: nn.Module) -> nn.Module:
    """The policy's model with every weight zero: nothing of an earlier sync passes for that of a later one."""
    model = merged_by_peft(policy)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def in_shards(engine: RolloutEngine, model: str, policy: nn.Module) -> dict[str, Any]:
    """The same policy under FSDP2: base and adapters in shards."""
    engine.sync_weights(policy, 5)
    expected = held(engine)
    sharded = with_adapters(model)
    sharded.load_state_dict(policy.state_dict())
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    engine.sync_weights(wiped(policy), 6)
    planned = engine.sync_weights(sharded, 7).planned
    engine.check_weights(sharded)
    return {"planned": planned, "equal": held(engine) == expected}


def refused(engine: RolloutEngine, model: str) -> dict[str, Any]:
    """Adapters that cannot be merged: the engine says so, and goes on."""
    said = {}
    for name, config in {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.items():
        try:
            engine.sync_weights(with_adapters(model, **config), 8)
        except ValueError as error:
            said[name] = str(error)
    return {"said": said, "then": len(engine.generate([[5, 6, 7]], SamplingConfig(max_tokens=4, ignore_eos=True)))}


def a_stale_adapter(engine: RolloutEngine, policy: nn.Module) -> str:
    """A sync that takes one matrix without its adapter: what a full check says of it."""
    names = rollout.weights.named_weights

    def without_one(policy: nn.Module) -> Iterator[tuple[str, Weight]]:
        for name, weight in names(policy):
            skipped = name == SKIPPED and isinstance(weight, LoraWeight)
            yield name, weight.base if skipped else weight

    rollout.weights.named_weights = without_one
    engine.sync_weights(policy, 9)
    rollout.weights.named_weights = names
    try:
        engine.check_weights(policy)
    except StaleWeights as error:
        return str(error)
    return "nothing"


def main() -> None:
    model, out, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    rank = int(os.environ.get("RANK", "0"))
    config = RolloutConfig(dtype=dtype, max_model_len=128, kv_cache_gib=0.25, block_size=32, enforce_eager=True)
    policy = with_adapters(model)
    with RolloutEngine(model, config) as engine:
        results: dict[str, Any] = {"first": engine.sync_weights(policy, 0).planned}
        results["base"] = held(engine)
        results["beside"] = beside_a_merged_policy(engine, policy)
        prompts = [np.random.default_rng(rank).integers(10, 400, size=12).tolist() for _ in range(8)]
        batch = engine.generate(prompts, SamplingConfig(max_tokens=8, ignore_eos=True))
        with torch.no_grad():
            results["gap"] = logprob_gap(policy, batch, torch.float32)[0]
        results["sharded"] = in_shards(engine, model, policy)
        results["refused"] = refused(engine, model)
        results["stale"] = a_stale_adapter(engine, policy)
        # Both ranks failed, and their watches would end them: what a test wants to know is known.
        (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
