"""The evaluation of one model, as a job of its own: `scripts/evaluate.py`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from rollout import RolloutBatch, RolloutEngine, init_world, watched
from trainers.config import EvaluateConfig
from trainers.dashboard import Dashboard
from trainers.data import Example
from trainers.held_out import load_evaluation_prompts
from trainers.loop import agreed_run_folder, evaluate_and_show
from trainers.rewards import check_answers, score


def run_evaluation(config: EvaluateConfig) -> Path:
    """Evaluate model.path once; called by every rank.

    Returns:
        The evaluation's folder: config, environment, metrics (one line), eval_samples.jsonl.

    Raises:
        ConfigError: if the data or a setting is at fault; found before the model is loaded.
    """
    disable_progress_bar()
    world = init_world()
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False)
    examples = load_evaluation_prompts(config, tokenizer)
    check_answers([example.answer for example in examples], config.reward)
    folder = agreed_run_folder(config, world, "eval")

    def reward(rollouts: RolloutBatch, of: Sequence[Example]) -> np.ndarray:
        return score(rollouts, [example.answer for example in of], tokenizer, config.reward)

    if world.is_main and config.run.progress:
        print(f"{folder}: {config.model.path} on {len(examples)} prompts of {origin(config)}", file=sys.stderr)
    with (
        watched(folder, config.rollout.stall_timeout_s) as watch,
        RolloutEngine(config.model.path, config.rollout) as engine,
        Dashboard(folder, config.wandb, config.run, 0, world.is_main) as dashboard,
        watch.busy("evaluating"),
    ):
        dashboard.log(0, evaluate_and_show(engine, examples, reward, tokenizer, config, 0, dashboard))
    dist.barrier()
    dist.destroy_process_group()
    return folder


def origin(config: EvaluateConfig) -> str:
    """Where the prompts come from, in words.

    >>> origin(EvaluateConfig())
    'arithmetic, all of it: a run of this config trains on them'
    """
    evaluation = config.evaluation
    source = evaluation.source or config.data.source
    if evaluation.held_out:
        return f"{source}, the share of {evaluation.held_out} that is held out"
    return source if evaluation.has_own_data else f"{source}, all of it: a run of this config trains on them"
