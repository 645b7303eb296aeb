"""Runs in every rank: several engines one after another, what each did written to OUT/rankN.json.

torchrun --nproc_per_node=2 generate_worker.py MODEL OUT [SCENARIO ...]
"""

import json
import random
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from rollout import RolloutBatch, RolloutConfig, RolloutEngine, SamplingConfig, init_world
from rollout.throughput import overlap_fraction
from tests.engine.trainer_state import changes, digest, trainer_state

NUM_SEQUENCES = 512
SAMPLINGS = {
    "sampled": SamplingConfig(max_tokens=12),
    "greedy": SamplingConfig(max_tokens=8, temperature=0.0),
    "filtered": SamplingConfig(max_tokens=8, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01),
    "groups": SamplingConfig(max_tokens=8, n=4, ignore_eos=True),
}


def prompts(rank: int, count: int, n: int = 1) -> list[list[int]]:
    """Of 2 to 40 tokens, others on each rank, and others for groups of n: none is in the prefix cache already."""
    rng = np.random.default_rng((rank, n))
    return [rng.integers(10, 400, size=rng.integers(2, 41)).tolist() for _ in range(count)]


def run(model: str, config: RolloutConfig, samplings: dict[str, SamplingConfig]) -> dict:
    before = trainer_state()
    engine = RolloutEngine(model, config)
    result: dict = {"describe": engine.describe(), "phases": {}}
    share = NUM_SEQUENCES // engine.world.size
    for name, sampling in samplings.items():
        steps: list[list] = []
        # By the last rank alone: what one rank does beside it is nothing to the others.
        on_step = (
            (lambda ended, steps=steps: steps.append(list(ended)))
            if engine.world.rank == engine.world.size - 1
            else None
        )
        batch = engine.generate(prompts(engine.world.rank, share // sampling.n, sampling.n), sampling, on_step=on_step)
        collected = engine._collected
        result["phases"][name] = {
            "group": engine.digest(),
            "tokens_of_group": digest(collected.token_ids, collected.lengths),
            "share": digest(batch.response_ids, batch.logprobs),
            "rows": len(batch),
            "tokens": int(batch.response_lengths.sum()),
            "distinct_in_first_group": len({tuple(batch[row].response_ids.tolist()) for row in range(sampling.n)}),
            "overlap": overlap_fraction(engine.timeline),
            "computed_tokens": int(engine.timeline.scheduled_tokens.sum()),
            "metrics": engine.metrics,
            "told": told(steps, batch) if on_step else None,
        }
    engine.close()
    result["changed"] = changes(before, trainer_state())
    result["threads_left"] = [thread.name for thread in threading.enumerate() if thread.name.startswith("execute")]
    # The segments are named after the process id of rank 0: one of this process or of its parent's other children.
    result["shared_memory_left"] = [path.name for path in Path("/dev/shm").glob("*rollout-*")]
    return result


def told(steps: list[list], batch: RolloutBatch) -> dict:
    """Whether `on_step` was told each row once, as the batch has it; and in how many of its calls anything."""
    ended = [row for step in steps for row, _ in step]
    return {
        "each_once": sorted(ended) == list(range(len(batch))),
        "as_in_the_batch": all(
            repr(asdict(rollout)) == repr(asdict(batch[row])) for step in steps for row, rollout in step
        ),
        "calls": len(steps),
        "calls_with_rows": sum(map(bool, steps)),
    }


def main() -> None:
    model, out, wanted = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    rank = init_world().rank  # first: with the default group comes a hook of torch's for uncaught errors
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(1000 + rank)  # the trainer may draw other numbers on each rank
    base = {"max_model_len": 128, "kv_cache_gib": 0.25, "enforce_eager": True}
    # 128 blocks' worth of tokens cannot hold 512 sequences: they are preempted and start over.
    small = base | {"kv_cache_gib": 0.25 / 64, "block_size": 32}
    only_sampled = {"sampled": SAMPLINGS["sampled"]}
    scenarios = {
        "asynchronous": (RolloutConfig(**base), SAMPLINGS),
        "synchronous": (RolloutConfig(**base, async_scheduling=False), SAMPLINGS),
        "asynchronous_small_cache": (RolloutConfig(**small), only_sampled),
        "synchronous_small_cache": (RolloutConfig(**small, async_scheduling=False), only_sampled),
    }
    results = {name: run(model, *scenarios[name]) for name in wanted or scenarios}
    (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
