"""A plan beside the truth: three steps of the experiment on this machine, their peak memory and their seconds."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench_step import ROOT, torchrun
from scripts.planning.planner import Plan
from trainers.config import Experiment
from trainers.memory_plan import GIB

STEPS = 3
"""The first one warms up; its seconds do not count."""


def check(config: Experiment, words: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Run it; the peak of the rank with the most (VmHWM), and the median seconds of each phase.

    Raises:
        RuntimeError: if the run fails.
    """
    section = config.algorithm.section
    with tempfile.TemporaryDirectory(prefix="plan-check-") as folder:
        told = [f"{section}.steps={STEPS}", f"run.directory={folder}", "run.name=run", "run.progress=false"]
        told += ["wandb.mode=disabled"]
        script = str(ROOT / "scripts" / f"{section}.py")
        _, peak = torchrun([script, *words, *told], Path(folder), ranks=plan.ranks)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = {phase: median(row.get(f"phase/{phase}_s", 0.0) for row in rows) for phase in plan.seconds}
    return {
        "peak_gib": peak,
        "seconds": seconds,
        "step_seconds": median(row["step/seconds"] for row in rows),
        "response_tokens": median(row["rollout/response_tokens_mean"] for row in rows),
    }


def comparison(plan: Plan, measured: dict[str, Any]) -> str:
    """Planned, measured and their ratio, as a table."""
    pairs = [("peak GiB of a rank", plan.peak / GIB, measured["peak_gib"])]
    pairs += [(f"{phase}, s", sum(parts.values()), measured["seconds"][phase]) for phase, parts in plan.seconds.items()]
    pairs.append(("step, s", plan.step_seconds, measured["step_seconds"]))
    lines = ["| | planned | measured | planned / measured |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {ours:.2f} | {theirs:.2f} | {f'{ours / theirs:.2f}' if theirs > 0.01 else ''} |"
        for name, ours, theirs in pairs
    ]
    mean = measured["response_tokens"]
    return "\n".join([*lines, "", f"Responses had {mean:.1f} tokens on average; the plan takes {plan.response}."])
