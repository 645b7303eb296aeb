"""Runs on one GPU: generates, sleeps and wakes with `rollout.sleep` as given; findings go to OUT/rank0.json.

torchrun --nproc_per_node=1 sleep_worker.py MODEL OUT kv_cache|all
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rollout import RolloutConfig, RolloutEngine, SamplingConfig

PROMPTS = [[number, 11, 12, 13] for number in range(20, 84)]
SAMPLING = SamplingConfig(max_tokens=16, ignore_eos=True)
KV_CACHE_GIB = 4.0


def refusal(engine: RolloutEngine) -> str:
    """What a `generate` right after the sleep says; "" where it works."""
    try:
        engine.generate(PROMPTS, SAMPLING, seed=0)
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def free() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def main() -> None:
    model, out, sleep = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda()
    config = RolloutConfig(max_model_len=64, max_num_seqs=64, kv_cache_gib=KV_CACHE_GIB, sleep=sleep)
    found: dict = {"weights": sum(each.numel() * each.element_size() for each in policy.parameters())}
    with RolloutEngine(model, config) as engine:
        with engine.awake():
            engine.sync_weights(policy, version=0)
            engine.generate(PROMPTS, SAMPLING, seed=0)
            found["digest"], before = engine.digest(), free()
        found["gained"], found["again"] = free() - before, engine.sleep()
        found["without_a_sync"] = refusal(engine)
        with engine.awake():
            engine.sync_weights(policy, version=1)
            engine.check_weights(policy)
            engine.generate(PROMPTS, SAMPLING, seed=0)
            found["digest_after"], found["kept"] = engine.digest(), before - free()
        everything = torch.empty(free() - 2**30, dtype=torch.uint8, device="cuda")
        found["shortage"] = refusal(engine) if sleep == "kv_cache" else ""
        del everything
    (out / "rank0.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
