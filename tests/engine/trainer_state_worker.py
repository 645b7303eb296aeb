"""Runs in every rank: engines beside a trainer that draws random numbers, other ones on each rank, or none at all.

torchrun --nproc_per_node=2 trainer_state_worker.py MODEL OUT
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, init_world
from tests.engine.trainer_state import changes, trainer_state

CONFIG = RolloutConfig(max_model_len=128, kv_cache_gib=0.25, enforce_eager=True)
SAMPLINGS = {
    "sampled": SamplingConfig(max_tokens=12),
    "filtered": SamplingConfig(max_tokens=8, temperature=0.7, top_k=20),
    "groups": SamplingConfig(max_tokens=8, n=4),
}
# What a trainer may have set, none of it the default.
HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD)


def nothing() -> None:
    pass


def draw() -> None:
    """As much as this rank likes, from every generator that it did not make itself."""
    count = 3 + 5 * int(os.environ["RANK"])
    random.random()
    np.random.random(count)
    torch.randn(count)
    torch.nn.functional.dropout(torch.ones(count), 0.5)


def run(model: str, trainer: Callable[[], None]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Digests of what was generated, by phase, and what each call has changed of the trainer's."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    digests, changed, state = {}, {}, trainer_state()
    hooks = state["hooks"]

    def called(name: str) -> None:
        """After each call: what is different now; then the trainer goes on."""
        nonlocal state
        now = trainer_state()
        if name != "close":
            now["hooks"] = hooks  # the watch's own while the engine is open
        changed[name] = changes(state, now)
        trainer()
        state = trainer_state() | {"hooks": hooks}

    trainer()
    state = trainer_state()
    engine = RolloutEngine(model, CONFIG)
    called("build")
    rng = np.random.default_rng(engine.world.rank)
    prompts = [rng.integers(10, 400, size=8).tolist() for _ in range(8)]
    for version, (name, sampling) in enumerate(SAMPLINGS.items()):
        engine.sync_weights(policy, version)
        called(f"sync before {name}")
        engine.generate(prompts, sampling)
        digests[name] = engine.digest()
        called(name)
    engine.close()
    called("close")
    return digests, changed


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    init_world()  # with the default group comes a hook of torch's for uncaught errors
    for number in HANDLED:
        signal.signal(number, lambda *_: None)
    sys.setswitchinterval(0.004)
    results = {}
    for name, trainer, seed in (("drawing", draw, 1000 + rank), ("quiet", nothing, 7)):
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(seed)
        digests, changed = run(model, trainer)
        results[name] = {"digests": digests, "changed": changed}
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
