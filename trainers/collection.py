"""What a step learns from: prompts answered and scored, round by round, and this rank's batch of it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from rollout import RolloutBatch, RolloutEngine, World, merge_groups
from trainers.across_ranks import sum_over_ranks
from trainers.balance import gather, groups_of, join, share_evenly
from trainers.batching import TrainBatch, make_batch, no_rows
from trainers.config import Experiment
from trainers.data import PromptStream
from trainers.dynamic_sampling import Round, add_rounds, count_groups, kept_groups, round_seed
from trainers.environment import Dialogue, Environment
from trainers.partial import Unfinished
from trainers.scoring import Scorer, join_scores

SAMPLES_FILE = "samples.jsonl"
SAMPLES_A_STEP = 4


def generate_rounds(
    engine: RolloutEngine,
    stream: PromptStream,
    environment: Environment,
    scorer: Scorer,
    config: Experiment,
    step: int,
    phase: Callable,
) -> tuple[list[Round], dict[str, float]]:
    """Generate and score; where equal groups are dropped, again until enough are found or the rounds are used up.

    Every rank makes as many rounds: how many groups were found is counted over all of them.

    Returns:
        This rank's rounds; and the rollout/* and reward/* metrics of all of them, all ranks.
    """
    hyper = config.algorithm
    rounds: list[Round] = []
    of_rounds: list[dict[str, float]] = []
    while not rounds or (len(rounds) < hyper.max_rounds and count_groups(rounds) < hyper.prompts_per_step):
        examples = next(stream)
        with engine.awake(), phase("generate"):
            seed = round_seed(step, len(rounds))
            rollouts, of_group = environment.generate(engine, examples, config.sampling, seed)
            of_rounds.append(rollout_metrics(engine, of_group))
        with phase("reward"):
            rounds.append(Round(examples, rollouts, scorer.score(rollouts, examples)))
    scores = join_scores([each.scores for each in rounds])
    return rounds, add_rounds(of_rounds) | scores.metrics() | reward_metrics(scores.total)


def generate_partly(
    engine: RolloutEngine,
    stream: PromptStream,
    unfinished: Unfinished,
    environment: Environment,
    scorer: Scorer,
    config: Experiment,
    step: int,
    phase: Callable,
) -> tuple[list[Round], dict[str, float]]:
    """Go on with what was carried, begin the step's prompts, and score the groups that are complete.

    Returns:
        As `generate_rounds`: one round, of this rank's complete groups, which may be none.
    """
    with engine.awake(), phase("generate"):
        drafts, examples = unfinished.begin(next(stream), config.sampling.n, step)
        of_group = environment.advance(engine, drafts, examples, config.sampling, round_seed(step, 0))
        metrics = rollout_metrics(engine, of_group)
        complete, examples = unfinished.take_complete()
        rollouts = environment.joined(complete, engine.version)
    with phase("reward"):
        scores = scorer.score(rollouts, examples)
    carried = {"rollout/carried": sum_over_ranks(torch.tensor(unfinished.num_rows)).item()} | version_lag(rollouts)
    return [Round(examples, rollouts, scores)], metrics | carried | scores.metrics() | reward_metrics(scores.total)


def version_lag(rollouts: RolloutBatch) -> dict[str, float]:
    """How many versions old the sampled tokens are, mean over all ranks; nothing where there are none."""
    lags = np.zeros(len(rollouts.response_ids), np.int32)
    if rollouts.versions is not None:
        lags = rollouts.version - rollouts.versions
    sampled = np.ones(len(lags), bool) if rollouts.generated is None else rollouts.generated
    total, count = sum_over_ranks(torch.tensor([float(lags[sampled].sum()), float(sampled.sum())])).tolist()
    return {"rollout/version_lag_mean": total / count} if count else {}


def batch_of(rounds: Sequence[Round], config: Experiment, world: World) -> tuple[TrainBatch, dict[str, float]]:
    """What this rank trains on: its part of what all ranks have generated; a collective.

    Returns:
        The batch; and how even the parts are, and how much was found where groups are dropped.
    """
    hyper = config.algorithm
    metrics: dict[str, float] = {}
    if hyper.drops_equal_groups:
        # Where responses are carried, more prompts may come to their end in a step than it begins.
        groups, metrics = kept_groups(rounds, None if config.partial.is_on else hyper.prompts_per_step)
    else:
        (only,) = rounds
        groups = gather(groups_of(only.rollouts, only.scores.total))
        if config.partial.is_on:
            metrics["rollout/trained_groups"] = len(groups)
    ours, imbalance = share_evenly(groups)
    batch = make_batch(*join(ours), world.device) if ours else no_rows(world.device)
    return batch, metrics | {"train/imbalance": imbalance}


def reward_metrics(totals: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of the responses' scores, all ranks; nothing where there are none."""
    scores = torch.from_numpy(totals).double()
    count, total, squares = sum_over_ranks(
        torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()])
    ).tolist()
    if not count:
        return {}
    mean = total / count
    return {"reward/mean": mean, "reward/std": max(squares / count - mean**2, 0.0) ** 0.5}


def rollout_metrics(engine: RolloutEngine, of_group: dict[str, float]) -> dict[str, float]:
    """The rollout/* metrics of the whole job: each tensor-parallel group counted once."""
    everyones: list = [None] * engine.world.size
    dist.all_gather_object(everyones, of_group)
    return merge_groups(everyones[:: engine.tensor_parallel_size])


def write_samples(
    folder: Path, step: int, first: Round, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue
) -> None:
    """Append a few of this rank's responses, one JSON object a line, special tokens shown; of several turns each."""
    with (folder / SAMPLES_FILE).open("a") as file:
        for rollout, reward in list(zip(first.rollouts, first.scores.total.tolist(), strict=True))[:SAMPLES_A_STEP]:
            example = first.examples[rollout.prompt_index]
            sample = {
                "step": step,
                "prompt": example.text,
                "response": tokenizer.decode(rollout.response_ids),
                "answer": example.answer,
                "reward": reward,
                "finish_reason": rollout.finish_reason,
                "version": rollout.version,
            }
            if rollout.versions is not None:
                sample["oldest_version"] = int(rollout.versions.min())
            if rollout.generated is not None:
                sample["turns"] = list(dialogue.texts(rollout))
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
