"""Train a language model with GRPO, Dr. GRPO, RLOO or REINFORCE++ (grpo.advantage).

    torchrun --nproc_per_node=2 scripts/grpo.py configs/grpo_arithmetic.yaml [section.key=value ...] [--dry-run]

`--help` lists every key. Also runs as one process: `python scripts/grpo.py ...`.
"""

from trainers.cli import run_cli
from trainers.config import GRPOConfig


def main(config: GRPOConfig) -> None:
    from trainers.grpo import train_grpo  # torch and vLLM load only once the config is known to be sound

    train_grpo(config)


if __name__ == "__main__":
    run_cli(GRPOConfig, main)
