"""Evaluate a model: accuracy, avg@k and pass@k on prompts that were held out of the training.

    torchrun --nproc_per_node=2 scripts/evaluate.py RUN/config.yaml model.path=RUN/policy [section.key=value ...]

`--help` lists every key. Also runs as one process: `python scripts/evaluate.py ...`.
"""

from trainers.cli import run_cli
from trainers.config import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    from trainers.evaluation_job import run_evaluation  # torch and vLLM load only once the config is known to be sound

    run_evaluation(config)


if __name__ == "__main__":
    run_cli(EvaluateConfig, main)
