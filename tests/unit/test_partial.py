"""Rows that are cut by count and carried: they say what they would have said, and are trained on in whole groups."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rollout import Draft, RolloutBatch, SamplingConfig, advance_drafts, join_drafts, one_by_one
from tests.unit.test_turns import STOP, ScriptedEngine
from trainers import grpo, ppo
from trainers.balance import groups_of, join
from trainers.batching import no_rows
from trainers.collection import version_lag
from trainers.config import GRPOConfig, PartialConfig, PPOConfig
from trainers.data import Example
from trainers.errors import ConfigError
from trainers.hyperparameters import GRPOHyperparameters, PPOHyperparameters
from trainers.partial import Unfinished
from trainers.scoring import Scores

EXAMPLES = [Example([number, number + 1], str(number), f"prompt {number}") for number in range(20)]
SAMPLING = SamplingConfig(max_tokens=20)


@dataclass
class KeyedEngine(ScriptedEngine):
    """A token is a function of stream and position; every seventh or so ends a turn."""

    def generate(self, prompts, sampling, *, seed, samples, max_tokens, streams) -> RolloutBatch:
        batch = super().generate(prompts, sampling, seed=seed, samples=samples, max_tokens=max_tokens, streams=streams)
        limits = np.repeat(max_tokens, samples).tolist()
        responses, logprobs = [], []
        for stream, length, limit in zip(batch.streams.tolist(), batch.prompt_lengths.tolist(), limits, strict=True):
            drawn = [int(np.random.default_rng([stream, length + at]).integers(3, 10)) for at in range(limit)]
            response = drawn[: drawn.index(STOP) + 1] if STOP in drawn else drawn
            responses.append(response)
            logprobs.append([-(stream + length + at) / 7 for at in range(len(response))])
        return replace(
            batch,
            response_ids=np.array(sum(responses, []), np.int32),
            response_lengths=np.array([len(response) for response in responses], np.int32),
            logprobs=np.array(sum(logprobs, []), np.float32),
            finished=np.array([response[-1] == STOP for response in responses], bool),
        )


def fresh(count: int) -> list[Draft]:
    prompt = np.array([1, 2], np.int32)
    return [Draft(prompt, 0) for _ in range(count)]


def teacher(rollout) -> list[int] | None:
    return None if rollout.num_generated > 12 else [50 + rollout.num_generated] * (1 + rollout.num_generated % 3)


@pytest.mark.parametrize("max_turns", [1, 5])
@pytest.mark.parametrize("allowance", [1, 2, 3, 7])
def test_a_row_says_what_it_would_have_said_uncut(allowance: int, max_turns: int):
    whole, parts = fresh(30), fresh(30)
    engine = KeyedEngine(max_model_len=32)
    advance_drafts(engine, whole, SAMPLING, one_by_one(teacher), max_turns, seed=0)
    phases = 0
    while not all(draft.done for draft in parts):
        engine.version = phases
        for draft in parts:
            before, draft.allowance = draft.num_generated, allowance
            assert draft.done or before == phases * allowance
        advance_drafts(engine, parts, SAMPLING, one_by_one(teacher), max_turns, seed=phases)
        phases += 1
    assert phases > 1
    batches = [join_drafts(drafts, engine.version) for drafts in (whole, parts)]
    for name in ("response_ids", "response_lengths", "logprobs", "generated", "finished", "streams"):
        np.testing.assert_array_equal(*(getattr(batch, name) for batch in batches), err_msg=name)
    for draft in parts:
        sampled = draft.versions[draft.generated]
        assert sampled.tolist() == [number // allowance for number in range(len(sampled))]
    assert {draft.finished for draft in parts} == ({True, False} if max_turns > 1 else {True})


def test_what_is_said_of_responses_is_of_those_that_ended():
    drafts = fresh(3)
    engine = KeyedEngine()
    drafts[0].allowance = 1
    metrics = advance_drafts(engine, drafts, SAMPLING, one_by_one(lambda rollout: None), 2, seed=0)
    assert not drafts[0].done and drafts[1].done and drafts[2].done
    ended = [draft.num_generated for draft in drafts[1:]]
    assert metrics["rollout/response_tokens_mean"] == np.mean(ended)


def unfinished_of(max_age: int = 2, tokens: int = 3) -> Unfinished:
    return Unfinished(PartialConfig(tokens, max_age), EXAMPLES)


def advance(unfinished: Unfinished, engine: KeyedEngine, step: int, count: int = 3) -> list[Example]:
    engine.version = step
    rows, _ = unfinished.begin(EXAMPLES[step * count : (step + 1) * count], 2, step)
    advance_drafts(engine, rows, SAMPLING, one_by_one(lambda rollout: None), 1, seed=step)
    taken, examples = unfinished.take_complete()
    assert [draft.prompt_index for draft in taken] == [index for index in range(len(examples)) for _ in range(2)]
    assert all(draft.done for draft in taken)
    return examples


def test_groups_come_whole_and_none_is_lost_or_too_old():
    unfinished, engine = unfinished_of(), KeyedEngine()
    begun: list[Example] = []
    ended: list[Example] = []
    for step in range(6):
        begun += EXAMPLES[step * 3 : (step + 1) * 3]
        ended += advance(unfinished, engine, step)
        for group in unfinished.groups:
            assert step - group.step < 2 and not all(draft.done for draft in group.drafts)
        assert unfinished.num_rows == sum(not d.done for group in unfinished.groups for d in group.drafts)
    left = [group.example for group in unfinished.groups]
    assert left and sorted(ended + left, key=EXAMPLES.index) == begun


def test_rows_of_the_oldest_age_run_to_their_ends():
    unfinished, engine = unfinished_of(max_age=1, tokens=1), KeyedEngine()
    advance(unfinished, engine, 0)
    advance(unfinished, engine, 1)
    assert {group.step for group in unfinished.groups} == {1}
    # 20 tokens at most: one in the first step, the rest in the last.
    assert max(max(call["max_tokens"]) for call in engine.calls) == 19


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def said(unfinished: Unfinished) -> list:
    return [
        (group.example.text, group.step, [(d.response_ids.tolist(), d.logprobs.tolist(), d.versions.tolist(), d.stream,
         d.turns, d.finished, d.done, d.generated.tolist(), d.prompt_ids.tolist()) for d in group.drafts])
        for group in unfinished.groups
    ]  # fmt: skip


def test_what_a_checkpoint_keeps_is_all_there_is(one_process):
    unfinished, engine = unfinished_of(max_age=4), KeyedEngine()
    for step in range(3):
        advance(unfinished, engine, step)
    content = unfinished.to_bytes()
    again = unfinished_of(max_age=4)
    again.from_bytes(content, rank=0, world_size=1)
    assert len(said(again)) > 3 and said(again) == said(unfinished)
    # Both go on alike.
    assert advance(unfinished, replace(engine), 3) == advance(again, replace(engine), 3)
    assert said(again) == said(unfinished)
    # Two ranks share what one had.
    halves = [unfinished_of(), unfinished_of()]
    for rank, half in enumerate(halves):
        half.from_bytes(content, rank=rank, world_size=2)
    assert len(halves[0].groups) - len(halves[1].groups) in (0, 1)
    first, second = said(halves[0]), said(halves[1])
    alone = unfinished_of()
    alone.from_bytes(content, rank=0, world_size=1)
    assert sorted(first + second) == sorted(said(alone))
    assert unfinished_of().to_bytes() == b""


def test_old_logprobs_and_versions_come_along_to_the_trainer(one_process):
    unfinished, engine = unfinished_of(), KeyedEngine()
    taken: list[Draft] = []
    for step in range(3):
        engine.version = step
        rows, _ = unfinished.begin(EXAMPLES[step : step + 1], 2, step)
        advance_drafts(engine, rows, SAMPLING, one_by_one(lambda rollout: None), 1, seed=step)
        taken += unfinished.take_complete()[0]
    batch = join_drafts(taken, engine.version)
    assert batch.versions is not None and len(set(batch.versions.tolist())) > 1
    joined, _ = join(groups_of(batch, np.zeros(len(batch))))
    np.testing.assert_array_equal(joined.versions, batch.versions)
    np.testing.assert_array_equal(joined.logprobs, batch.logprobs)
    assert version_lag(batch)["rollout/version_lag_mean"] == pytest.approx((2 - batch.versions).mean())
    assert version_lag(replace(batch, versions=None)) == {"rollout/version_lag_mean": 0.0}
    assert version_lag(join_drafts([], 2)) == {}


def test_a_step_without_a_complete_group_has_no_rewards():
    nothing = np.zeros(0, np.float32)
    assert Scores(nothing, {"length": nothing}, nothing.astype(bool)).metrics() == {}


@pytest.mark.parametrize("advantage", ["grpo", "reinforce_pp", "ppo"])
def test_a_rank_without_a_group_makes_the_others_collectives(advantage, monkeypatch):
    whitened = []
    for module in (ppo, grpo):
        monkeypatch.setattr(module, "whiten", lambda values, mask: whitened.append(values.shape) or values)
    if advantage == "ppo":
        batch = ppo.targets(no_rows("cpu"), PPOConfig())
    else:
        batch = grpo.targets(no_rows("cpu"), GRPOConfig(grpo=GRPOHyperparameters(advantage=advantage)))
    assert len(batch) == 0 and batch.advantages.shape == torch.Size([0, 0])
    assert len(whitened) == (advantage != "grpo")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"partial": PartialConfig(3)}, "grpo.old_logprobs is trainer.*set grpo.old_logprobs=engine or grpo.mismatch"),
        (
            {"partial": PartialConfig(64), "grpo": GRPOHyperparameters(old_logprobs="engine")},
            "no response would ever be carried; lower partial.tokens_per_step",
        ),
        (
            {
                "partial": PartialConfig(3),
                "grpo": GRPOHyperparameters(old_logprobs="engine", filter_groups=True, oversample=1),
            },
            "grpo.oversample is 1.*set grpo.oversample=0",
        ),
    ],
)
def test_what_contradicts_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        GRPOConfig(**given)


def test_what_fits_is_not():
    GRPOConfig(partial=PartialConfig(3), grpo=GRPOHyperparameters(mismatch="truncate"))
    PPOConfig(partial=PartialConfig(3), sampling=SamplingConfig(n=2), ppo=PPOHyperparameters(old_logprobs="engine"))
    with pytest.raises(ConfigError, match="partial.max_age is 0; it must be at least 1"):
        PartialConfig(3, max_age=0)


def test_the_names_are_explained_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE))
    assert {"rollout/carried", "rollout/version_lag_mean"} <= named
