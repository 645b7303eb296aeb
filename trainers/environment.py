"""The configured environment between the engine and the policy: turns as text, in the model's chat template and back.

Without an environment the engine generates by itself, and nothing here costs anything.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout import (
    CUT,
    Draft,
    Observation,
    OnStep,
    Rollout,
    RolloutBatch,
    RolloutEngine,
    SamplingConfig,
    advance_drafts,
    join_drafts,
)
from trainers.config import EnvironmentConfig
from trainers.conversation import EnvironmentFunction, Episode, answer_episode
from trainers.data import Example
from trainers.errors import ConfigError
from trainers.reward_functions import Failed, load_functions
from trainers.reward_pool import RewardPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "environment.function"
OF_TURNS = ("rollout/turns_mean", "rollout/observation_tokens")
"""Say nothing where there is no environment."""
POLICY, REPLY = "THE-POLICYS-TURN", "THE-ENVIRONMENTS-TURN"  # stand-ins: what the template puts around them


class EnvironmentFailed(RuntimeError):
    """The environment failed on a conversation, and environment.on_error is raise."""


class Dialogue:
    """Observations as token ids, with what the model's chat template puts around them; and responses as texts.

    Args:
        tokenizer: of the model.
        role: whose message an observation is; none, or a model without a chat template, takes the text as it stands.

    Raises:
        ConfigError: if the template does not take such a message.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", role: str) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._after: list[int] = []
        if role != "none" and tokenizer.chat_template is not None:
            before, after = _around(tokenizer, role)
            self._before, self._after = self._ids(before), self._ids(after)

    def wrap(self, text: str, last_token: int) -> list[int]:
        """Token ids that follow a turn.

        Args:
            last_token: of that turn. Where the template ends a message with the same token, it does not come twice.
        """
        before = self._before
        if before and before[0] == last_token:
            before = before[1:]
        return [*before, *self._ids(text), *self._after]

    def texts(self, rollout: Rollout) -> tuple[str, ...]:
        """The response by turns, the policy's and the environment's, without special tokens and template."""
        if rollout.generated is None:
            return (self._text(rollout.response_ids),)
        bounds = [0, *(np.flatnonzero(np.diff(rollout.generated)) + 1).tolist(), len(rollout.response_ids)]
        turns = []
        for start, end in pairwise(bounds):
            ids = rollout.response_ids[start:end].tolist()
            turns.append(self._text(ids if rollout.generated[start] else self._unwrapped(ids)))
        return tuple(turns)

    def _unwrapped(self, ids: list[int]) -> list[int]:
        before = len(self._before)
        if ids[:before] != self._before:
            before -= 1  # its first token ended the turn
        return ids[before : len(ids) - len(self._after)]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _text(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Environment:
    """Generates as the config says, with an environment or without. Make it before the engine, and close it.

    Args:
        config: which function, and where it runs.
        tokenizer: of the model.
        beat: called as conversations are answered, as a sign of life.

    Raises:
        ConfigError: if the function cannot be loaded, or the chat template does not take its observations.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        tokenizer: "PreTrainedTokenizerBase",
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._beat = beat
        self._pool: RewardPool | None = None
        self._functions: dict[str, EnvironmentFunction] = {}
        self.dialogue = Dialogue(tokenizer, config.role if config.function else "none")
        if config.function is None:
            return
        if config.workers:
            self._pool = RewardPool([config.function], config.workers, config.timeout_s, beat, answer_episode, KEY)
        else:
            self._functions = load_functions([config.function], KEY)

    def generate(
        self,
        engine: RolloutEngine,
        examples: Sequence[Example],
        sampling: SamplingConfig,
        seed: int,
        on_step: OnStep | None = None,
    ) -> tuple[RolloutBatch, dict[str, float]]:
        """Responses to this rank's prompts; all ranks of the tensor-parallel group call it together.

        Args:
            on_step: as of `RolloutEngine.generate`; called only where there is no environment, which alone knows
                whether a response has ended.

        Returns:
            As `RolloutEngine.generate`; and the rollout/* metrics of the group.

        Raises:
            EnvironmentFailed: if the environment failed and config.on_error is raise.
        """
        if self._config.function is None:
            prompts = [example.prompt_ids for example in examples]
            return engine.generate(prompts, sampling, seed=seed, on_step=on_step), engine.metrics
        drafts = drafts_of(examples, sampling.n)
        metrics = self.advance(engine, drafts, examples, sampling, seed)
        return self.joined(drafts, engine.version), metrics

    def advance(
        self,
        engine: RolloutEngine,
        drafts: Sequence[Draft],
        examples: Sequence[Example],
        sampling: SamplingConfig,
        seed: int,
    ) -> dict[str, float]:
        """`rollout.advance_drafts` with the environment: rows come to their ends, or to those of their allowances.

        Args:
            drafts: whose `prompt_index` is into `examples`.

        Returns:
            The rollout/* metrics of the group.

        Raises:
            EnvironmentFailed: if the environment failed and config.on_error is raise.
        """
        if self._config.function is None:
            metrics = advance_drafts(engine, drafts, sampling, _nobody, 1, seed)
            return {name: value for name, value in metrics.items() if name not in OF_TURNS}
        spent = {"rollout/environment_seconds": 0.0, "rollout/environment_failed": 0.0}

        def observe(rollouts: Sequence[Rollout]) -> list[Observation]:
            start = time.perf_counter()
            observations, failed = self._observe(rollouts, examples)
            spent["rollout/environment_seconds"] += time.perf_counter() - start
            spent["rollout/environment_failed"] += failed
            return observations

        metrics = advance_drafts(engine, drafts, sampling, observe, self._config.max_turns, seed)
        everyones = engine.everyones(spent)
        metrics["rollout/environment_seconds"] = max(each["rollout/environment_seconds"] for each in everyones)
        metrics["rollout/environment_failed"] = sum(each["rollout/environment_failed"] for each in everyones)
        return metrics

    def joined(self, drafts: Sequence[Draft], version: int) -> RolloutBatch:
        """Rows that have ended as one batch; without an environment one of single turns."""
        batch = join_drafts(drafts, version)
        return batch if self._config.function is not None else replace(batch, generated=None)

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Environment":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _observe(self, rollouts: Sequence[Rollout], examples: Sequence[Example]) -> tuple[list[Observation], int]:
        """An observation each; and how often the environment failed."""
        asked = [examples[rollout.prompt_index] for rollout in rollouts]
        episodes = [
            Episode(example.text, example.answer, self.dialogue.texts(rollout))
            for example, rollout in zip(asked, rollouts, strict=True)
        ]
        observations: list[Observation] = []
        failed = 0
        for rollout, episode, found in zip(rollouts, episodes, self._answers(episodes), strict=True):
            if not isinstance(found, Failed):
                last = int(rollout.response_ids[-1])
                observations.append(None if found is None else self.dialogue.wrap(found, last))
            elif self._config.on_error == "raise":
                raise EnvironmentFailed(_story(found, episode))
            else:
                observations.append(CUT)
                failed += 1
        return observations, failed

    def _answers(self, episodes: Sequence[Episode]) -> list[str | None | Failed]:
        if self._pool is not None:
            return self._pool.judge(episodes)
        found = []
        for episode in episodes:
            found.append(answer_episode(self._functions, episode))
            self._beat()
        return found


def drafts_of(examples: Sequence[Example], n: int) -> list[Draft]:
    """`n` fresh rows for each example, which share its prompt."""
    prompts = [np.asarray(example.prompt_ids, np.int32) for example in examples]
    return [Draft(prompt, index) for index, prompt in enumerate(prompts) for _ in range(n)]


def _nobody(rollouts: Sequence[Rollout]) -> list[Observation]:
    raise AssertionError("there is no environment to ask")


def _around(tokenizer: Any, role: str) -> tuple[str, str]:
    """What the chat template puts between the policy's words and an observation, and between it and the next ones."""
    from jinja2 import TemplateError

    messages = [
        {"role": "user", "content": "."},
        {"role": "assistant", "content": POLICY},
        {"role": role, "content": REPLY},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        _, _, rest = text.partition(POLICY)
        before, found, after = rest.partition(REPLY)
        if not found:
            raise TemplateError("it leaves such messages out")
    except TemplateError as error:
        raise ConfigError(
            f"the model's chat template refuses a message of environment.role={role} after the assistant's: {error}; "
            "set environment.role=user, or none to take observations as they stand"
        ) from error
    return before, after


def _story(failed: Failed, episode: Episode) -> str:
    return (
        f"environment: {failed.function} failed on a conversation: {failed.reason.strip()}\n"
        f"The prompt was {episode.prompt[:200]!r}, the last turn {episode.turns[-1][:500]!r}. environment.on_error=cut "
        "ends such rollouts as a limit would and goes on."
    )
