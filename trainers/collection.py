"""What a step learns from: prompts answered and scored, round by round, and this rank's batch of it."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from rollout import RolloutBatch, RolloutEngine, World, merge_groups
from trainers.across_ranks import sum_over_ranks
from trainers.balance import gather, groups_of, join, share_evenly
from trainers.batching import TrainBatch, make_batch, no_rows
from trainers.config import Experiment
from trainers.dashboard import memory_metrics
from trainers.data import PromptStream
from trainers.dynamic_sampling import Round, add_rounds, count_groups, kept_groups, round_seed
from trainers.environment import Dialogue, Environment
from trainers.partial import Unfinished
from trainers.scoring import Scorer, join_scores

SAMPLES_FILE = "samples.jsonl"
SAMPLES_A_STEP = 4


@dataclass(frozen=True)
class Collector:
    """Where a step's responses come from: prompts, engine, environment and rewards.

    Attributes:
        phase: takes the time of what is done inside, by name.
    """

    engine: RolloutEngine
    stream: PromptStream
    environment: Environment
    scorer: Scorer
    unfinished: Unfinished
    config: Experiment
    phase: Callable[[str], AbstractContextManager[None]]

    def collect(self, step: int) -> tuple[list[Round], dict[str, float]]:
        """Generate and score what the step trains on; a collective.

        Returns:
            This rank's rounds; and the rollout/*, rank/* and reward/* metrics of all of them, all ranks.
        """
        return self._partly(step) if self.config.partial.is_on else self._in_rounds(step)

    def _in_rounds(self, step: int) -> tuple[list[Round], dict[str, float]]:
        """Where equal groups are dropped, again until enough are found or the rounds are used up.

        Every rank makes as many rounds: how many groups were found is counted over all of them.
        """
        hyper = self.config.algorithm
        rounds: list[Round] = []
        of_rounds: list[dict[str, float]] = []
        with self.engine.awake():  # through all rounds: an engine that has slept may have given its weights back
            while not rounds or (len(rounds) < hyper.max_rounds and count_groups(rounds) < hyper.prompts_per_step):
                examples = next(self.stream)
                with self.phase("generate"):
                    seed = round_seed(step, len(rounds))
                    scoring = self.scorer.begin(examples)
                    cpu_s = time.process_time()
                    rollouts, of_group = self.environment.generate(
                        self.engine, examples, self.config.sampling, seed, scoring.on_step
                    )
                    of_rounds.append(rollout_metrics(self.engine, of_group, time.process_time() - cpu_s))
                with self.phase("reward"):
                    rounds.append(Round(examples, rollouts, scoring.finish(rollouts)))
        scores = join_scores([each.scores for each in rounds])
        return rounds, add_rounds(of_rounds) | scores.metrics() | reward_metrics(scores.total)

    def _partly(self, step: int) -> tuple[list[Round], dict[str, float]]:
        """Go on with what was carried, begin the step's prompts, and score the groups that are complete: one round."""
        with self.engine.awake(), self.phase("generate"):
            drafts, examples = self.unfinished.begin(next(self.stream), self.config.sampling.n, step)
            cpu_s = time.process_time()
            of_group = self.environment.advance(
                self.engine, drafts, examples, self.config.sampling, round_seed(step, 0)
            )
            metrics = rollout_metrics(self.engine, of_group, time.process_time() - cpu_s)
            complete, examples = self.unfinished.take_complete()
            rollouts = self.environment.joined(complete, self.engine.version)
        with self.phase("reward"):
            scores = self.scorer.score(rollouts, examples)
        carried = {"rollout/carried": sum_over_ranks(torch.tensor(self.unfinished.num_rows)).item()}
        metrics |= carried | version_lag(rollouts) | scores.metrics() | reward_metrics(scores.total)
        return [Round(examples, rollouts, scores)], metrics


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
    """Mean and standard deviation of the responses' scores, all ranks; nothing where there are none. A collective.

    Args:
        totals: (responses,) float, this rank's; maybe none.
    """
    scores = torch.from_numpy(totals).double()
    count, total, squares = sum_over_ranks(
        torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()])
    ).tolist()
    if not count:
        return {}
    mean = total / count
    return {"reward/mean": mean, "reward/std": max(squares / count - mean**2, 0.0) ** 0.5}


def rollout_metrics(engine: RolloutEngine, of_group: dict[str, float], cpu_s: float) -> dict[str, float]:
    """The rollout/* metrics of the whole job, each tensor-parallel group counted once; and the rank/* ones of all.

    Args:
        of_group: its phase's.
        cpu_s: that this rank's process has computed for the phase, all threads.
    """
    ours = {"rank/cpu_s": cpu_s} | memory_metrics()
    everyones: list = [None] * engine.world.size
    dist.all_gather_object(everyones, (of_group, ours))
    merged = merge_groups([metrics for metrics, _ in everyones[:: engine.tensor_parallel_size]])
    return merged | rank_metrics([rollout | of_rank for rollout, of_rank in everyones])


def rank_metrics(everyones: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of which a rank's own is of interest, by its number.

    >>> rank_metrics([{"rank/cpu_s": 1.5, "rollout/seconds": 2.0}, {"rank/cpu_s": 0.5, "rollout/seconds": 2.0}])
    {'rank/0/cpu_s': 1.5, 'rank/1/cpu_s': 0.5}
    """
    names = ("rank/cpu_s", "rollout/host_gap_fraction", "memory/rss_gib", "memory/device_gib")
    return {
        f"rank/{rank}/{name.partition('/')[2]}": figures[name]
        for rank, figures in enumerate(everyones)
        for name in names
        if name in figures
    }


def samples_of(step: int, first: Round, tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> list[dict[str, Any]]:
    """A few of this rank's responses, special tokens shown; of several turns each."""
    samples = []
    for rollout, reward in list(zip(first.rollouts, first.scores.total.tolist(), strict=True))[:SAMPLES_A_STEP]:
        sample = {
            "step": step,
            "prompt": first.examples[rollout.prompt_index].text,
            "response": tokenizer.decode(rollout.response_ids),
            "answer": first.examples[rollout.prompt_index].answer,
            "reward": reward,
            "tokens": len(rollout.response_ids),
            "finish_reason": rollout.finish_reason,
            "version": rollout.version,
        }
        if rollout.versions is not None:
            sample["oldest_version"] = int(rollout.versions.min())
        if rollout.generated is not None:
            sample["turns"] = list(dialogue.texts(rollout))
        samples.append(sample)
    return samples


def write_samples(folder: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Append them, one JSON object a line."""
    with (folder / SAMPLES_FILE).open("a") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
