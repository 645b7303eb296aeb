"""The evaluation of one model, as a job of its own: `scripts/evaluate.py`."""

import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from rollout import RolloutEngine, beat, init_world, watched
from trainers.cli import dump
from trainers.config import EvaluateConfig, RunConfig
from trainers.dashboard import Dashboard
from trainers.environment import Environment
from trainers.evaluation import evaluate_and_show
from trainers.nodes import COLLECTIVE_SLACK_S, check_groups
from trainers.prepare import prepare
from trainers.run_folder import agreed_run_folder
from trainers.scoring import Scorer


def run_evaluation(config: EvaluateConfig) -> Path:
    """Evaluate model.path once; called by every rank.

    Returns:
        The evaluation's folder: config, environment, metrics (one line), eval_samples.jsonl.

    Raises:
        ConfigError: if the data or a setting is at fault; found before the model is loaded.
    """
    disable_progress_bar()
    world = init_world(COLLECTIVE_SLACK_S + config.rollout.stall_timeout_s)
    check_groups(config)
    found = prepare(config, world.size)
    tokenizer, examples = found.tokenizer, found.evaluation
    with (
        Environment(config.environment, tokenizer, beat) as environment,
        Scorer(config.reward, tokenizer, beat, environment.dialogue) as scorer,
    ):
        folder = agreed_run_folder(of_evaluation(config.run), dump(config), "eval")
        if world.is_main and config.run.progress:
            print(f"{folder}: {config.model.path} on {len(examples)} prompts of {origin(config)}", file=sys.stderr)
        with (
            watched(folder, config.rollout.stall_timeout_s) as watch,
            RolloutEngine(config.model.path, config.rollout) as engine,
            Dashboard(folder, config.wandb, config.run, 0, world.is_main) as dashboard,
            watch.busy("evaluating"),
        ):
            metrics = evaluate_and_show(
                engine, examples, scorer, tokenizer, config.sampling, config.evaluation, 0, dashboard,
                environment.generate,
            )  # fmt: skip
            dashboard.log(0, metrics)
    dist.barrier()
    dist.destroy_process_group()
    return folder


def of_evaluation(run: RunConfig) -> RunConfig:
    """The name of a run that is there already is the evaluated run's, from its config.yaml: it is not ours to take.

    >>> of_evaluation(RunConfig(directory="docs", name="pictures")).name is None
    True
    """
    taken = run.name is not None and (Path(run.directory) / run.name).exists()
    return replace(run, name=None) if taken else run


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
