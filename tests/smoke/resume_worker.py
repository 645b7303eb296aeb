"""Runs in every rank: one of the scripts, with rewards that every random generator has a say in; it may kill its job.

    torchrun --nproc_per_node=2 resume_worker.py ALGORITHM ROWS SECONDS BREAK [what the script takes]

Launcher and ranks are killed SECONDS after metrics.jsonl has ROWS rows that were not there at the start; never if ROWS
is 0. BREAK leaves a part of what is resumed out (see BREAKS), to see that the tests would notice.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import trainers.checkpoint
import trainers.loop
import trainers.resume
from trainers.cli import run_cli
from trainers.config import Experiment, GRPOConfig, PPOConfig
from trainers.grpo import train_grpo
from trainers.ppo import train_ppo
from trainers.scoring import Scores, Scoring

SCRIPTS: dict[str, tuple[type[Experiment], Callable[[Any], Path]]] = {
    "ppo": (PPOConfig, train_ppo),
    "grpo": (GRPOConfig, train_grpo),
}


def noisy(score: Callable[..., Scores]) -> Callable[..., Scores]:
    """The task's score, and a number of each generator: so that a lost one shows in the metrics."""

    def scored(*args: Any) -> Scores:
        scores = score(*args)
        noise = torch.rand(scores.total.shape).numpy() + random.random() + np.random.rand()
        return replace(scores, total=scores.total + noise.astype(scores.total.dtype))

    return scored


def kill_later(metrics: Path, rows: int, seconds: float) -> None:
    """Wait in a thread for the rows, then kill everybody at once: nobody is left to clean up."""
    before = count(metrics)

    def watch() -> None:
        while count(metrics) < before + rows:
            time.sleep(0.005)
        time.sleep(seconds)
        launcher = psutil.Process(os.getppid())
        ranks = launcher.children(recursive=True)
        for process in [launcher, *(rank for rank in ranks if rank.pid != os.getpid())]:
            process.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def count(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def without_optimizer() -> None:
    read = trainers.checkpoint.read_tensors

    def read_policy_alone(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        read(folder, {name: tensor for name, tensor in tensors.items() if name.startswith("policy.")})

    trainers.checkpoint.read_tensors = read_policy_alone


def without_policy() -> None:
    read = trainers.checkpoint.read_tensors

    def read_optimizer_alone(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        read(folder, {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")})

    trainers.checkpoint.read_tensors = read_optimizer_alone


def without_random() -> None:
    trainers.checkpoint.set_random_state = lambda state: None


def without_position() -> None:
    restore = trainers.loop.restore

    def and_back_to_the_first_prompt(start: Any, learner: Any, stream: Any, seed: int) -> None:
        restore(start, learner, stream, seed)
        stream.position = 0

    trainers.loop.restore = and_back_to_the_first_prompt


def without_carried() -> None:
    trainers.loop.restore_carried = lambda *_: None


BREAKS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "optimizer": without_optimizer,
    "policy": without_policy,
    "random": without_random,
    "position": without_position,
    "carried": without_carried,
}


def main() -> None:
    algorithm, rows, seconds, broken = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    config_class, train = SCRIPTS[algorithm]
    Scoring.finish = noisy(Scoring.finish)

    def run(config: Any) -> None:
        BREAKS[broken]()
        if rows and os.environ["RANK"] == "0":
            kill_later(Path(config.run.directory) / config.run.name / "metrics.jsonl", rows, seconds)
        train(config)

    run_cli(config_class, run, sys.argv[5:])


if __name__ == "__main__":
    main()
