"""Train a language model with PPO.

    torchrun --nproc_per_node=2 scripts/ppo.py configs/ppo_arithmetic.yaml [section.key=value ...] [--dry-run]

`--help` lists every key. Also runs as one process: `python scripts/ppo.py ...`.
"""

from trainers.cli import run_cli
from trainers.config import PPOConfig


def main(config: PPOConfig) -> None:
    from trainers.ppo import train_ppo  # torch and vLLM load only once the config is known to be sound

    train_ppo(config)


if __name__ == "__main__":
    run_cli(PPOConfig, main)
