"""This rank's responses scored by the configured rewards, here or in worker processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rollout import OnStep, Rollout, RolloutBatch
from trainers.across_ranks import sum_over_ranks
from trainers.config import RewardConfig
from trainers.data import Example
from trainers.environment import Dialogue
from trainers.reward_functions import Failed, RewardFunction, Sample, Task, judge, load_functions
from trainers.reward_pool import RewardPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RewardError(RuntimeError):
    """A reward function failed on a response, and reward.on_error is raise."""


@dataclass(frozen=True)
class Scores:
    """Of this rank's responses.

    Attributes:
        total: (batch,) float32, the weighted sum that is trained on.
        parts: by the function's name, (batch,) float32, unweighted; without functions of the user's own, none.
        failed: (batch,) bool; True where a function failed: total and parts are then 0.
        early: of the verdicts, how many were there when the last response was; None where no worker could have been
            at work meanwhile.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray
    early: int | None = None

    def metrics(self) -> dict[str, float]:
        """reward/failed, each reward/NAME_mean and, with workers, reward/overlapped_fraction; none without responses.

        Over all responses of all ranks: a collective.
        """
        columns = [np.ones(len(self.total)), self.failed, np.array(self.early or 0), *self.parts.values()]
        count, failed, early, *sums = sum_over_ranks(torch.tensor([float(column.sum()) for column in columns])).tolist()
        if not count:
            return {}
        means = {f"reward/{name}_mean": total / count for name, total in zip(self.parts, sums, strict=True)}
        overlapped = {} if self.early is None else {"reward/overlapped_fraction": early / count}
        return {"reward/failed": failed} | means | overlapped


def join_scores(scores: Sequence[Scores]) -> Scores:
    """Those of several batches as one; at least one, all by one Scorer."""
    parts = {name: np.concatenate([each.parts[name] for each in scores]) for name in scores[0].parts}
    total, failed = (np.concatenate([getattr(each, name) for each in scores]) for name in ("total", "failed"))
    early = None if scores[0].early is None else sum(each.early or 0 for each in scores)
    return Scores(total, parts, failed, early)


class Scorer:
    """The configured rewards, ready to score. Make it before the engine, and close it.

    Args:
        config: which functions, and where they run.
        tokenizer: decodes the responses; special tokens are left out.
        beat: called as responses are scored, as a sign of life.
        dialogue: reads responses of several turns; None where there are none.

    Raises:
        ConfigError: if a function cannot be loaded.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: "PreTrainedTokenizerBase",
        beat: Callable[[], None] = lambda: None,
        dialogue: Dialogue | None = None,
    ) -> None:
        self._config = config
        self._dialogue = dialogue
        self._tokenizer = tokenizer
        self._beat = beat
        self._pool: RewardPool | None = None
        self._functions: dict[str, RewardFunction] = {}
        if config.workers:
            self._pool = RewardPool(config.paths, config.workers, config.timeout_s, beat)
        else:
            self._functions = load_functions(config.paths)

    def score(self, rollouts: RolloutBatch, examples: Sequence[Example]) -> Scores:
        """Score each response of this rank.

        Args:
            rollouts: this rank's share.
            examples: (prompts of this rank,), in the order in which they were given to `generate`; the responses of
                one prompt (sampling.n) share it.

        Raises:
            RewardError: if a function failed and config.on_error is raise.
        """
        return self.begin(examples).finish(rollouts)

    def begin(self, examples: Sequence[Example]) -> "Scoring":
        """Of a phase that has yet to be generated; nothing else is scored until it is finished."""
        return Scoring(self._config, self._texts, examples, self._pool, self._judge_here)

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _judge_here(self, task: Task) -> list[float] | Failed:
        verdict = judge(self._functions, task)
        self._beat()
        return verdict

    def _texts(self, rollout: Rollout) -> tuple[str, ...]:
        """The response by turns; a single one where there is no environment."""
        if rollout.generated is not None:
            assert self._dialogue is not None
            return self._dialogue.texts(rollout)
        return (str(self._tokenizer.decode(rollout.response_ids, skip_special_tokens=True)),)


class Scoring:
    """The scores of one phase of generation: with workers begun while it lasts, without them when it has ended.

        scoring = scorer.begin(examples)
        rollouts = engine.generate(prompts, on_step=scoring.on_step)
        scores = scoring.finish(rollouts)

    Made by `Scorer.begin`.
    """

    def __init__(
        self,
        config: RewardConfig,
        texts: Callable[[Rollout], tuple[str, ...]],
        examples: Sequence[Example],
        pool: RewardPool | None,
        judge_here: Callable[[Task], list[float] | Failed],
    ) -> None:
        self._config, self._texts, self._examples = config, texts, examples
        self._pool, self._judge_here = pool, judge_here
        self._tasks: dict[int, Task] = {}
        self._judged = 0

    @property
    def on_step(self) -> OnStep | None:
        """For `generate`; None without workers, which alone can score while it runs."""
        return None if self._pool is None else self._take

    def finish(self, rollouts: RolloutBatch) -> Scores:
        """The scores of all responses of this rank.

        Raises:
            RewardError: if a function failed and config.on_error is raise.
        """
        early = None if self._pool is None else self._judged
        self._begin([(row, rollout) for row, rollout in enumerate(rollouts) if row not in self._tasks])
        values = np.zeros((len(rollouts), len(self._config.paths)))
        failed = np.zeros(len(rollouts), bool)
        verdicts = dict(zip(self._tasks, self._verdicts(), strict=True))
        for row in sorted(verdicts):
            verdict = verdicts[row]
            if not isinstance(verdict, Failed):
                values[row] = verdict
            elif self._config.on_error == "raise":
                raise RewardError(_story(verdict, self._tasks[row]))
            else:
                failed[row] = True
        total = values @ np.array(self._config.weights or [1.0] * values.shape[1])
        names = self._config.names if self._config.functions else []
        parts = {name: values[:, column].astype(np.float32) for column, name in enumerate(names)}
        return Scores(total.astype(np.float32), parts, failed, early)

    def _take(self, ended: Sequence[tuple[int, Rollout]]) -> None:
        assert self._pool is not None
        self._begin(ended)
        self._judged = self._pool.poll()

    def _begin(self, ended: Sequence[tuple[int, Rollout]]) -> None:
        """Note the tasks, and give them to the workers, if there are any."""
        for row, rollout in ended:
            finished = rollout.finish_reason == "stop"
            if finished or not self._config.require_finish:
                turns = self._texts(rollout)
                example = self._examples[rollout.prompt_index]
                spoken = turns if rollout.generated is not None else ()
                sample = Sample(example.text, finished, rollout.num_generated, spoken)
                self._tasks[row] = Task(turns[-1], example.answer, sample)
                if self._pool is not None:
                    self._pool.submit(self._tasks[row])

    def _verdicts(self) -> list[list[float] | Failed]:
        """In the order of the tasks."""
        if self._pool is not None:
            return self._pool.collect()
        return [self._judge_here(task) for task in self._tasks.values()]


def _story(failed: Failed, task: Task) -> str:
    return (
        f"reward: {failed.function} failed on a response: {failed.reason.strip()}\n"
        f"The prompt was {task.sample.prompt[:200]!r}, the answer {task.answer[:200]!r}, the response "
        f"{task.response[:500]!r}. reward.on_error=zero gives such responses 0 and goes on."
    )
