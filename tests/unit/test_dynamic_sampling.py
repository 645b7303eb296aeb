"""Groups without signal are dropped, and nothing else; what is left is a batch like any other."""

import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import trainers.collection
from rollout import RolloutBatch
from trainers.balance import join
from trainers.batching import make_batch, no_rows
from trainers.collection import Collector
from trainers.config import GRPOConfig, SamplingConfig
from trainers.dynamic_sampling import groups_with_signal, round_seed
from trainers.errors import ConfigError
from trainers.evaluation import EVALUATION_SEED
from trainers.grpo import targets
from trainers.hyperparameters import GRPOHyperparameters
from trainers.scoring import Scores

LENGTHS = [1, 2, 3, 4, 5, 6]


def rollouts() -> RolloutBatch:
    """Three prompts of two responses; prompt p is [p, p], response r holds r + 1 times r."""
    return RolloutBatch(
        prompt_ids=np.repeat(np.arange(3, dtype=np.int32), 4),
        prompt_lengths=np.full(6, 2, np.int32),
        response_ids=np.concatenate([np.full(length, length - 1, np.int32) for length in LENGTHS]),
        response_lengths=np.array(LENGTHS, np.int32),
        logprobs=-np.arange(sum(LENGTHS), dtype=np.float32),
        finished=np.array([True, False] * 3),
        prompt_index=np.repeat(np.arange(3, dtype=np.int32), 2),
        version=7,
    )


def test_groups_that_score_alike_are_dropped():
    groups = groups_with_signal(rollouts(), np.array([0, 1, 1, 1, 0.25, 0.5], np.float32))
    assert [group.rollouts[0].prompt_ids.tolist() for group in groups] == [[0, 0], [2, 2]]
    assert groups[1].scores.tolist() == [0.25, 0.5]
    assert groups_with_signal(rollouts(), np.ones(6)) == []


def test_joined_groups_are_their_rows_and_nothing_else():
    batch, scores = join(groups_with_signal(rollouts(), np.array([0, 1, 1, 1, 0.25, 0.5])))
    assert scores.tolist() == [0, 1, 0.25, 0.5]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1] and batch.version == 7
    for row, of in enumerate((0, 1, 4, 5)):
        ours, theirs = batch[row], rollouts()[of]
        assert ours.prompt_ids.tolist() == theirs.prompt_ids.tolist()
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        assert ours.logprobs.tolist() == theirs.logprobs.tolist()
        assert ours.finish_reason == theirs.finish_reason


class Recorded:
    """Stands in for the engine, environment, rewards and prompts of a Collector: notes what is asked of them."""

    version = 0

    def __init__(self, scores: list[list[float]]) -> None:
        self.scores, self.said = iter(scores), []

    @contextmanager
    def awake(self):
        yield self
        self.said.append("asleep")

    @contextmanager
    def phase(self, name):
        self.said.append(name)
        yield

    def __next__(self):
        return [None] * 3

    def begin(self, examples):
        return self

    on_step = None

    def generate(self, *_):
        return rollouts(), {"rollout/generated_tokens": 21, "rollout/seconds": 1.0}

    def finish(self, batch):
        total = np.array(next(self.scores))
        return Scores(total, {}, np.zeros(len(total), bool))


def test_the_engine_stays_awake_through_all_rounds_of_a_step(monkeypatch):
    # Where it sleeps with rollout.sleep=all its weights are gone, and no sync stands between two rounds.
    monkeypatch.setattr(trainers.collection, "rollout_metrics", lambda engine, of_group, cpu_s: of_group)
    recorded = Recorded([[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]])
    hyper = GRPOHyperparameters(filter_groups=True, oversample=3, prompts_per_step=3)
    config = GRPOConfig(sampling=SamplingConfig(n=2), grpo=hyper)
    collector = Collector(recorded, recorded, recorded, recorded, None, config, recorded.phase)
    found, _ = collector.collect(step=0)
    assert len(found) == 2, "1 of 3 groups, then 2 of 3"
    assert recorded.said == ["generate", "reward"] * 2 + ["asleep"]


def test_no_two_rounds_share_their_streams():
    seeds = [round_seed(step, number) for step in range(50) for number in range(4)] + [EVALUATION_SEED]
    assert len(set(seeds)) == len(seeds)
    streams = {tuple(np.random.SeedSequence((0, seed)).generate_state(4)) for seed in seeds}
    assert len(streams) == len(seeds)


def test_a_rank_without_rows_has_minibatches_without_rows():
    empty = targets(no_rows("cpu"), GRPOConfig())
    assert [len(part) for part in empty.minibatches(3, 2, seed=0)] == [0] * 6
    two = make_batch(rollouts(), np.zeros(6), "cpu").select(torch.tensor([0, 1]))
    assert [len(part) for part in two.minibatches(3, 1, seed=0)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"oversample": 2}, "set grpo.filter_groups=true"),
        ({"filter_groups": True, "oversample": -1}, "grpo.oversample is -1"),
        ({"filter_groups": True, "advantage": "reinforce_pp"}, "reinforce_pp learns"),
    ],
)
def test_what_cannot_be_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        GRPOConfig(sampling=SamplingConfig(n=2), grpo=GRPOHyperparameters(**given))


def test_the_names_are_explained_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    explained = set(re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE))
    assert {"rollout/kept_groups_fraction", "rollout/rounds", "rollout/trained_groups"} <= explained
