"""Runs in every rank: scripts/ppo.py with 19,000 stop tokens, so that a model that talks nonsense ends some turns.

(On the command line a list of that length would take a minute to parse.)

torchrun --nproc_per_node=2 turns_run_worker.py [what the script takes]
"""

import sys
from dataclasses import replace

from trainers.cli import run_cli
from trainers.config import PPOConfig
from trainers.ppo import train_ppo


def main(config: PPOConfig) -> None:
    train_ppo(replace(config, sampling=replace(config.sampling, stop_token_ids=list(range(1000, 20000)))))


if __name__ == "__main__":
    run_cli(PPOConfig, main, sys.argv[1:])
