"""Runs on one GPU: builds the engine three ways, syncs weights into it and closes it; findings go to OUT/rank0.json.

torchrun --nproc_per_node=1 engine_worker.py MODEL OUT
"""

import gc
import hashlib
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rollout import RolloutBatch, RolloutConfig, RolloutEngine, SamplingConfig, init_world

NUM_SEQUENCES = 512
SAMPLING = SamplingConfig(max_tokens=64, ignore_eos=True)
SHORT = SamplingConfig(max_tokens=16, ignore_eos=True)
GIB = 1024**3
OURS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
A_SECOND = int(1.5e9)  # clock cycles


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def trainer_state() -> dict:
    return {
        "python": digest(np.array([hash(random.getstate())])),
        "numpy": digest(np.random.get_state()[1]),
        "torch": digest(torch.get_rng_state().numpy()),
        "cuda": digest(torch.cuda.get_rng_state().numpy()),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.current_device(),
        "stream": torch.cuda.current_stream().cuda_stream,
        "grad": torch.is_grad_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled(),
        # Where the engine runs and how much vLLM prints is ours to say.
        "environment": {name: value for name, value in os.environ.items() if name not in OURS},
    }


def changed(before: dict) -> dict[str, str]:
    """What differs from `before`, and how."""
    after = trainer_state()
    result = {name: f"{before[name]} -> {after[name]}" for name in before if before[name] != after[name]}
    if "environment" in result:
        old, new = before["environment"], after["environment"]
        result["environment"] = str({key: new.get(key) for key in {*old, *new} if old.get(key) != new.get(key)})
    return result


def prompts(count: int) -> list[list[int]]:
    """Of 16 to 64 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(10, 40000, size=rng.integers(16, 65)).tolist() for _ in range(count)]


@torch.no_grad()
def policy_logprobs(policy: torch.nn.Module, batch: RolloutBatch) -> list[np.ndarray]:
    """The trainer's log-probs of the batch's response tokens: bf16 forward, float32 log-softmax, a row at a time."""
    result = []
    for row in batch:
        ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids]), dtype=torch.long, device="cuda")[None]
        logits = policy(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0, len(row.prompt_ids) :, None])[:, 0]
        result.append(chosen.cpu().numpy())
    return result


def difference(policy: torch.nn.Module, batch: RolloutBatch) -> float:
    """Mean |engine's log-prob - trainer's|, in nats a token."""
    return float(np.mean(np.abs(np.concatenate(policy_logprobs(policy, batch)) - batch.logprobs)))


def perturb(policy: torch.nn.Module, scale: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator, device="cuda", dtype=torch.float32)
                parameter.add_((scale * noise).to(parameter.dtype))


def build_and_generate(model: str, config: RolloutConfig) -> tuple[RolloutEngine, dict]:
    before = trainer_state()
    start = time.perf_counter()
    engine = RolloutEngine(model, config)
    result: dict = {"build_s": time.perf_counter() - start, "changed_by_build": changed(before)}
    result["describe"] = engine.describe()
    before = trainer_state()
    batch = engine.generate(prompts(NUM_SEQUENCES), SAMPLING, seed=1)
    result["changed_by_generate"] = changed(before)
    result["tokens"] = batch.response_ids.reshape(NUM_SEQUENCES, -1).tolist()
    result["digest"] = digest(batch.response_ids, batch.response_lengths)
    result["logprobs_digest"] = digest(batch.logprobs)
    again = engine.generate(prompts(NUM_SEQUENCES), SAMPLING, seed=1)
    result["repeat_digest"] = digest(again.response_ids, again.response_lengths)
    result["metrics"] = engine.metrics
    # The same sequences in a smaller batch: other kernels, so that some tokens may differ; most must not.
    few = engine.generate(prompts(64), SAMPLING, seed=1)
    result["equal_sequences_in_small_batch"] = float(
        np.mean((few.response_ids == batch.response_ids[: 64 * SAMPLING.max_tokens]).reshape(64, -1).all(1))
    )
    return engine, result


def weights(model: str, engine: RolloutEngine) -> dict:
    """Sync three policies; compare the engine's log-probs with each policy's own, and with a stale one's."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
    generator = torch.Generator("cuda").manual_seed(5)
    result: dict = {"before_sync": difference(policy, engine.generate(prompts(32), SHORT))}
    perturb(policy, 0.02, generator)
    result["stale"] = difference(policy, engine.generate(prompts(32), SHORT))
    torch.cuda.synchronize()
    before = trainer_state()
    reports = [engine.sync_weights(policy, version) for version in range(5)]
    result["changed_by_sync"] = changed(before)
    result["sync_seconds"] = [report.seconds for report in reports]
    result["sync_num_bytes"] = reports[-1].num_bytes
    result["after_sync"] = difference(policy, engine.generate(prompts(32), SHORT))
    with torch.no_grad():
        policy.model.layers[5].mlp.down_proj.weight.mul_(2.0)
    result["one_stale_layer"] = difference(policy, engine.generate(prompts(32), SHORT))
    engine.sync_weights(policy, 5)
    result["after_second_sync"] = difference(policy, engine.generate(prompts(32), SHORT))
    policy32 = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).cuda().eval()
    engine.sync_weights(policy32, 6)
    result["after_float32_sync"] = difference(policy32, engine.generate(prompts(32), SHORT))
    return result


def ordering(model: str, engine: RolloutEngine) -> dict:
    """Sync while the policy's update still runs on the trainer's stream, and overwrite the policy right afterwards."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
    for each in (policy, reference):
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if "down_proj" in name:
                    parameter.mul_(2.0)
    engine.sync_weights(policy, 10)
    torch.cuda.synchronize()
    with torch.no_grad():
        torch.cuda._sleep(A_SECOND)  # the optimizer's step is still under way ...
        for each in (policy, reference):
            for layer in each.model.layers:
                layer.mlp.up_proj.weight.mul_(0.5)
    engine.sync_weights(policy, 11)  # ... when the sync is asked for
    result = {"update_under_way": difference(reference, engine.generate(prompts(32), SHORT))}

    update = torch.cuda.Stream()
    update.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(update):
        for factor in (2.0, 0.5):  # exact; and whoever does not wait sees what is doubled
            for parameter in policy.parameters():
                parameter.mul_(factor)
            torch.cuda._sleep(A_SECOND if factor == 2.0 else 0)
        if engine._core.executor.sync_layers():  # there is a plan to compare by
            engine.check_weights(policy)
    torch.cuda.current_stream().wait_stream(update)

    engine._core.executor.thread.run(torch.cuda._sleep, A_SECOND)  # the engine's stream is busy ...
    engine.sync_weights(policy, 12)
    with torch.no_grad():
        for parameter in policy.parameters():  # ... and the trainer goes on at once
            parameter.zero_()
    result["overwritten_after"] = difference(reference, engine.generate(prompts(32), SHORT))
    return result


def close(engine: RolloutEngine, free_before: int) -> dict:
    free_in_use = torch.cuda.mem_get_info()[0]
    engine.close()
    gc.collect()
    torch.cuda.empty_cache()
    ones = torch.ones(1, device="cuda")
    dist.all_reduce(ones)
    return {
        "gib_in_use": (free_before - free_in_use) / GIB,
        "gib_kept": (free_before - torch.cuda.mem_get_info()[0]) / GIB,
        "gib_allocated": torch.cuda.memory_allocated() / GIB,
        "threads_left": [thread.name for thread in threading.enumerate() if thread.name.startswith("execute")],
        "group_alive": dist.is_initialized() and ones.item() == dist.get_world_size(),
    }


def save(results: dict, out: Path) -> None:
    (out / "rank0.json").write_text(json.dumps(results))


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    torch.set_float32_matmul_precision("high")
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(1000)
    init_world()
    torch.rand(1, device="cuda")
    torch.cuda.synchronize()
    base = {"max_model_len": 256, "gpu_memory_utilization": 0.3}
    results: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    free_before = torch.cuda.mem_get_info()[0]
    engine, results["asynchronous"] = build_and_generate(model, RolloutConfig(**base))
    save(results, out)
    results["weights"] = weights(model, engine)
    results["ordering"] = ordering(model, engine)
    save(results, out)
    results["asynchronous"]["close"] = close(engine, free_before)
    del engine
    for name, config in {
        "synchronous": RolloutConfig(**base, async_scheduling=False),
        "eager": RolloutConfig(**base, enforce_eager=True),
    }.items():
        free_before = torch.cuda.mem_get_info()[0]
        engine, results[name] = build_and_generate(model, config)
        results[name]["close"] = close(engine, free_before)
        del engine
        save(results, out)


if __name__ == "__main__":
    main()
