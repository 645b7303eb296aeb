"""Turns by rounds: what goes on, for how long, with which stream; a policy and environments that follow a script."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from rollout import CUT, RolloutBatch, SamplingConfig, generate_turns, one_by_one

STOP = 9


@dataclass
class ScriptedEngine:
    """Says `length` tokens a turn, the last one STOP, as far as it may; their value is that of their position.

    Others of its group have rounds to go as long as `others` says.
    """

    length: int = 3
    max_model_len: int = 100
    others: int = 0
    version: int = 4
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        number = len(self.calls)
        figures = {"rollout/generated_tokens": 10 * number, "rollout/seconds": 2.0, "rollout/decode_steps": number}
        return figures | {"rollout/preemptions": 0, "rollout/sequences": 100 - number, "rollout/kv_cache_usage": 0.5}

    def everyones(self, value: Any) -> list[Any]:
        return [value]

    def any_rank(self, value: bool) -> bool:
        return value or len(self.calls) < self.others

    def generate(self, prompts, sampling, *, seed, samples, max_tokens, streams) -> RolloutBatch:
        self.calls.append({"prompts": prompts, "samples": samples, "max_tokens": max_tokens, "streams": streams})
        rows = [
            (prompt, limit, stream)
            for prompt, count, limit, stream in zip(prompts, samples, max_tokens, streams, strict=True)
            for _ in range(count)
        ]
        lengths = [min(self.length, limit) for _, limit, _ in rows]
        responses = [
            [STOP if place == self.length - 1 else len(prompt) + place for place in range(length)]
            for (prompt, _, _), length in zip(rows, lengths, strict=True)
        ]
        return RolloutBatch(
            prompt_ids=np.array([token for prompt, _, _ in rows for token in prompt], np.int32),
            prompt_lengths=np.array([len(prompt) for prompt, _, _ in rows], np.int32),
            response_ids=np.array([token for response in responses for token in response], np.int32),
            response_lengths=np.array(lengths, np.int32),
            logprobs=-np.arange(1, 1 + sum(lengths), dtype=np.float32),
            finished=np.array([length == self.length for length in lengths], bool),
            prompt_index=np.repeat(np.arange(len(prompts), dtype=np.int32), samples),
            version=self.version,
            streams=np.array([1000 + row if stream is None else stream for row, (_, _, stream) in enumerate(rows)]),
        )


def play(engine: ScriptedEngine, environment, prompts=([1, 2],), max_turns=9, **sampling):
    settings = SamplingConfig(**{"max_tokens": 50} | sampling)
    return generate_turns(engine, list(prompts), settings, one_by_one(environment), max_turns)


def test_observations_stand_between_the_turns_and_are_told_apart():
    engine = ScriptedEngine()
    batch, metrics = play(engine, lambda rollout: [7, 7] if rollout.num_generated < 6 else None)
    assert batch[0].response_ids.tolist() == [2, 3, STOP, 7, 7, 7, 8, STOP]
    assert batch[0].generated.tolist() == [True] * 3 + [False] * 2 + [True] * 3
    assert batch[0].logprobs.tolist() == [-1, -2, -3, 0, 0, -1, -2, -3]
    assert batch[0].finish_reason == "stop" and batch.version == 4
    assert batch.generated_lengths.tolist() == [6] and batch[0].num_generated == 6
    assert engine.calls[1] == {
        "prompts": [[1, 2, 2, 3, STOP, 7, 7]],
        "samples": [1],
        "max_tokens": [47],
        "streams": [1000],
    }
    assert metrics["rollout/turns_mean"] == 2 and metrics["rollout/observation_tokens"] == 2
    assert metrics["rollout/response_tokens_mean"] == 6 and metrics["rollout/truncated_fraction"] == 0
    # Of two calls: 10 + 20 tokens in 4 seconds, over the rows of the first.
    assert metrics["rollout/generated_tokens"] == 30 and metrics["rollout/generated_tokens_per_s"] == 7.5
    assert metrics["rollout/sequences"] == 99


def test_samples_of_a_prompt_start_together_and_each_goes_on_by_itself():
    engine = ScriptedEngine()
    asked = []

    def environment(rollout):
        asked.append(rollout.prompt_index)
        return [8] if len(asked) in (2, 3) else None  # the second sample of prompt 0, the first of prompt 1

    batch, _ = play(engine, environment, prompts=[[1, 2], [1, 2]], n=2)
    assert asked == [0, 0, 1, 1, 0, 1]
    assert engine.calls[0]["samples"] == [2, 2] and engine.calls[0]["streams"] == [None, None]
    assert engine.calls[1]["samples"] == [1, 1] and engine.calls[1]["streams"] == [1001, 1002]
    assert batch.response_lengths.tolist() == [3, 7, 7, 3] and batch.prompt_index.tolist() == [0, 0, 1, 1]
    assert batch.streams.tolist() == [1000, 1001, 1002, 1003]


def test_max_turns_ends_a_rollout_unasked():
    asked = []
    batch, metrics = play(ScriptedEngine(), lambda rollout: asked.append(0) or [7], max_turns=3)
    assert len(asked) == 2 and metrics["rollout/turns_mean"] == 3
    assert batch[0].finish_reason == "stop"


def test_max_tokens_counts_the_policys_tokens_of_all_turns():
    engine = ScriptedEngine()
    batch, _ = play(engine, lambda rollout: [7] * 5, max_tokens=8)
    assert [call["max_tokens"] for call in engine.calls] == [[8], [5], [2]]
    assert batch.generated_lengths.tolist() == [8] and batch.response_lengths.tolist() == [18]
    assert batch[0].finish_reason == "length"


@pytest.mark.parametrize(("limit", "lengths"), [(9, [3]), (10, [3 + 4 + 1]), (12, [3 + 4 + 3]), (16, [10]), (17, [15])])
def test_max_model_len_counts_everything_and_a_response_ends_with_a_sampled_token(limit, lengths):
    batch, metrics = play(ScriptedEngine(max_model_len=limit), lambda rollout: [7] * 4)
    assert batch.response_lengths.tolist() == lengths and batch[0].generated[-1]
    assert batch[0].finish_reason == "length" and metrics["rollout/truncated_fraction"] == 1
    assert len(batch[0].prompt_ids) + lengths[0] <= limit


def test_an_environment_may_cut():
    batch, _ = play(ScriptedEngine(), lambda rollout: CUT)
    assert batch[0].finish_reason == "length" and batch[0].response_ids.tolist() == [2, 3, STOP]


def test_a_turn_that_was_cut_is_not_answered():
    asked = []
    batch, _ = play(ScriptedEngine(), lambda rollout: asked.append(0), max_tokens=2)
    assert not asked and batch[0].finish_reason == "length"


def test_an_empty_observation_is_refused():
    with pytest.raises(ValueError, match="empty observation; give text, or None"):
        play(ScriptedEngine(), lambda rollout: [])


def test_a_rank_that_is_done_makes_the_others_rounds():
    engine = ScriptedEngine(others=4)
    batch, _ = play(engine, lambda rollout: None)
    assert [len(call["prompts"]) for call in engine.calls] == [1, 0, 0, 0]
    assert batch.response_lengths.tolist() == [3]


def test_a_rank_without_prompts():
    batch, metrics = play(ScriptedEngine(), lambda rollout: None, prompts=[])
    assert len(batch) == 0 and "rollout/turns_mean" not in metrics
