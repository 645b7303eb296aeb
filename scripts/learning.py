"""Does it learn? PPO and GRPO on one-digit sums, several seeds; the same broken on purpose; the curves.

    python scripts/learning.py [--algorithms ppo,grpo] [--seeds 0,1,2] [--broken] [--json FILE] [--picture FILE]

Each run starts from the default model, on two ranks, with a fifth of the pairs of operands kept out of the training.
Shown for each: the mean reward of the last five steps, greedy accuracy on the held-out sums before and after, minutes.
With --broken every algorithm also runs with the advantages' sign turned, with its mask moved by one token, and with an
engine whose weights are never synced after the first time: these must not get there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts/ is no installed package

HELD_OUT = ["evaluation.held_out=0.2", "evaluation.temperature=0"]
REWARD, ACCURACY = 0.8, 0.7  # to be reached
LAST = 5  # steps that the final reward is the mean of


@dataclass
class Learned:
    """One run.

    Attributes:
        rewards: mean of each step.
        before, after: greedy accuracy on sums that were not trained on.
    """

    algorithm: str
    seed: int
    broken: str
    rewards: list[float]
    before: float
    after: float
    minutes: float

    @property
    def reward(self) -> float:
        return fmean(self.rewards[-LAST:])

    @property
    def reached(self) -> bool:
        return self.reward >= REWARD and self.after >= ACCURACY


def turn_advantages() -> None:
    """What was good is bad."""
    from trainers import grpo, ppo

    modules: list[Any] = [grpo, ppo]
    for module in modules:
        with_targets = module.targets

        def turned(batch, config, with_targets=with_targets):
            batch = with_targets(batch, config)
            return batch.with_targets(-batch.advantages, batch.returns)

        module.targets = turned


def move_mask() -> None:
    """Each token's log-prob is taken for its neighbour's."""
    from trainers import packing, policy

    hidden_states = packing.response_hidden_states

    def moved(model, batch):
        return hidden_states(model, batch).roll(1, dims=0)

    policy.response_hidden_states = moved


def keep_weights() -> None:
    """The engine goes on with what it got first."""
    from rollout import RolloutEngine

    sync = RolloutEngine.sync_weights
    first: list = []

    def once(engine, model, version):
        if not first:
            first.append(sync(engine, model, version))
        return first[0]

    RolloutEngine.sync_weights = once  # type: ignore[method-assign]


BREAKS = {"advantages turned": turn_advantages, "mask moved by one": move_mask, "stale engine": keep_weights}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", default="ppo,grpo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--broken", action="store_true", help="the broken ones only, with the first seed")
    parser.add_argument("--json", type=Path, help="write the runs there")
    parser.add_argument("--picture", type=Path, help="draw the curves there")
    parser.add_argument("overrides", nargs="*", help="of the config, as section.key=value")
    args = parser.parse_args()
    args.algorithms = args.algorithms.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if unknown := set(args.algorithms) - {"ppo", "grpo"}:
        parser.error(f"--algorithms has {sorted(unknown)}; there are ppo, grpo")
    return args


def learn(algorithm: str, seed: int, broken: str, overrides: list[str]) -> Learned:
    """One run in processes of its own.

    Raises:
        RuntimeError: if it fails; with the end of its output.
    """
    config = f"configs/{algorithm}_arithmetic.yaml"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="learning-") as folder:
        words = [__file__, "--rank", broken, algorithm, config, f"run.directory={folder}", "run.name=run"]
        words += ["run.progress=false", "wandb.mode=disabled", f"run.seed={seed}", f"rollout.seed={seed}"]
        words += [f"data.seed={seed}", *HELD_OUT, "evaluation.every=1000", *overrides]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *words]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            raise RuntimeError(f"{algorithm}, seed {seed}, {broken or 'whole'}: {done.stderr[-3000:]}")
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    minutes = (time.perf_counter() - start) / 60
    return Learned(algorithm, seed, broken, rewards, accuracies[0], accuracies[-1], minutes)


def as_a_rank(broken: str, algorithm: str, argv: list[str]) -> None:
    """What runs under torchrun: the algorithm's own script, after the break."""
    from trainers.cli import run_cli
    from trainers.config import Experiment, GRPOConfig, PPOConfig

    def main(config: Experiment) -> None:
        if broken:
            BREAKS[broken]()
        from trainers.grpo import train_grpo
        from trainers.ppo import train_ppo

        if isinstance(config, PPOConfig):
            train_ppo(config)
        elif isinstance(config, GRPOConfig):
            train_grpo(config)

    run_cli(PPOConfig if algorithm == "ppo" else GRPOConfig, main, argv)


def table(runs: list[Learned]) -> str:
    lines = ["| algorithm | seed | broken | reward, first and last 5 steps | held-out accuracy | minutes | reached |"]
    lines.append("|---|---|---|---|---|---|---|")
    for run in runs:
        first = fmean(run.rewards[:LAST])
        cells = [run.algorithm, str(run.seed), run.broken, f"{first:.2f} -> {run.reward:.2f}"]
        cells += [f"{run.before:.2f} -> {run.after:.2f}", f"{run.minutes:.1f}", "yes" if run.reached else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: list[Learned], file: Path) -> None:
    """Reward by step, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colours = {"ppo": "tab:blue", "grpo": "tab:orange"}
    for run in runs:
        label = f"{run.algorithm.upper()}, {run.broken or f'seed {run.seed}'}"
        steps, style = range(1, len(run.rewards) + 1), ":" if run.broken else "-"
        axes.plot(steps, run.rewards, style, color=colours[run.algorithm], alpha=0.8, label=label)
    axes.axhline(REWARD, color="grey", linewidth=0.8)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1), title="One-digit sums, the default 135M model")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    args = arguments()
    cases = [(algorithm, seed, "") for seed in args.seeds for algorithm in args.algorithms]
    if args.broken:
        cases = [(algorithm, args.seeds[0], broken) for broken in BREAKS for algorithm in args.algorithms]
    runs = []
    for case in cases:
        runs.append(learn(*case, args.overrides))
        print(table(runs[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    print(table(runs))
    if args.picture:
        draw(runs, args.picture)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        as_a_rank(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main()
