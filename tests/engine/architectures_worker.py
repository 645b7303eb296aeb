"""Runs in every rank: what engines of several architectures compute after a sync by the plan, and after a reload.

torchrun --nproc_per_node=2 architectures_worker.py OUT DTYPE eager|compiled FAMILY...
"""

import json
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, init_world
from rollout.backend.weight_sync import fingerprint
from rollout.backend.worker import reload_policy_weights
from rollout.weights import empty_prefix_cache

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
HEAD = {"head_dim": 32}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama, tied head": lambda: LlamaConfig(**SHAPE, **HEAD, tie_word_embeddings=True),
    "llama, biases": lambda: LlamaConfig(**SHAPE, **HEAD, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SHAPE, **HEAD, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**SHAPE, **HEAD),
    "phi3": lambda: Phi3Config(**SHAPE),
    "phi": lambda: PhiConfig(**SHAPE),  # biases everywhere, the output head's too
}
WITHOUT_A_PLAN = ("phi3", "phi")
"""Whose loaders do more than move rectangles: their weights are reloaded."""
PROMPTS = [[(7 * row + 3 * place) % 500 + 3 for place in range(3 + 2 * row)] for row in range(6)]


def main() -> None:
    out, dtype, mode, *families = sys.argv[1:]
    world = init_world()
    results = {}
    for family in families or FAMILIES:
        folder = Path(out) / "model"
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            random_model(family).save_pretrained(folder)
        dist.barrier()
        config = RolloutConfig(
            dtype=dtype, max_model_len=128, kv_cache_gib=0.25, block_size=32, enforce_eager=mode == "eager"
        )
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        with RolloutEngine(str(folder), config) as engine:
            results[family] = both_ways(engine, policy)
        dist.barrier()
    (Path(out) / f"rank{world.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def random_model(family: str) -> PreTrainedModel:
    """The same each time; norms and biases are random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def both_ways(engine: RolloutEngine, policy: torch.nn.Module) -> dict[str, Any]:
    """The same weights by the plan, and by vLLM's reload of all of them: what is held and computed then."""
    engine.sync_weights(policy, 0)  # makes the plan
    before = computed(engine)
    flip_signs(policy, seed=1)
    planned = engine.sync_weights(policy, 1).planned
    if planned:
        engine.check_weights(policy)
    layers = engine._core.executor.sync_layers()
    by_plan = {"layers": fingerprint(layers), **computed(engine)}
    flip_signs(policy, seed=2)
    reload(engine, policy)
    between = computed(engine)
    flip_signs(policy, seed=2)
    reload(engine, policy)
    by_reload = {"layers": fingerprint(layers), **computed(engine)}
    return {
        "planned": planned,
        "num_logits": by_plan["num_logits"],
        "equal": {name: by_plan[name] == by_reload[name] for name in by_plan},
        "moved": len({each["logits"] for each in (before, by_plan, between)}) == 3,
    }


def computed(engine: RolloutEngine) -> dict[str, Any]:
    """Of a prefill and of decode steps: a checksum of all logits, bit for bit, and of what is sampled in shards."""
    empty_prefix_cache(engine._core)
    runner = engine._core.executor.driver_worker.model_runner
    sampler, seen = runner.sampler, []

    def sees_logits(logits: torch.Tensor, sampling_metadata: Any) -> Any:
        seen.append(logits.float().contiguous().clone())
        return sampler(logits=logits, sampling_metadata=sampling_metadata)

    runner.sampler = sees_logits
    engine.generate(PROMPTS, SamplingConfig(max_tokens=8, top_k=20, ignore_eos=True), seed=1)  # over whole rows
    runner.sampler = sampler
    assert all(logits.shape[1] == SHAPE["vocab_size"] and logits.isfinite().all() for logits in seen)
    logits = zlib.crc32(b"".join(each.numpy().tobytes() for each in seen))
    engine.generate(PROMPTS, SamplingConfig(max_tokens=8, ignore_eos=True), seed=1)
    return {"logits": logits, "num_logits": sum(each.numel() for each in seen), "sampled": engine.digest()}


def reload(engine: RolloutEngine, policy: torch.nn.Module) -> None:
    executor = engine._core.executor
    executor.thread.run(reload_policy_weights, executor._sync()._worker, policy.named_parameters())


def flip_signs(policy: torch.nn.Module, seed: int) -> None:
    """Of half of all numbers; the same once more takes it back exactly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1)


if __name__ == "__main__":
    main()
