"""This rank's responses scored by the configured rewards, here or in worker processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rollout import RolloutBatch
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
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray

    def metrics(self) -> dict[str, float]:
        """reward/failed and each reward/NAME_mean, over all responses of all ranks: a collective; none without."""
        columns = [np.ones(len(self.total)), self.failed, *self.parts.values()]
        count, failed, *sums = sum_over_ranks(torch.tensor([float(column.sum()) for column in columns])).tolist()
        if not count:
            return {}
        means = {f"reward/{name}_mean": total / count for name, total in zip(self.parts, sums, strict=True)}
        return {"reward/failed": failed} | means


def join_scores(scores: Sequence[Scores]) -> Scores:
    """Those of several batches as one; at least one, all by one Scorer."""
    parts = {name: np.concatenate([each.parts[name] for each in scores]) for name in scores[0].parts}
    return Scores(
        np.concatenate([each.total for each in scores]), parts, np.concatenate([each.failed for each in scores])
    )


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
        turns = self._turns(rollouts)
        rows = [row for row, finished in enumerate(rollouts.finished) if finished or not self._config.require_finish]
        tasks = [self._task(rollouts, row, turns[row], examples) for row in rows]
        values = np.zeros((len(rollouts), len(self._config.paths)))
        failed = np.zeros(len(rollouts), bool)
        for row, task, verdict in zip(rows, tasks, self._judge(tasks), strict=True):
            if not isinstance(verdict, Failed):
                values[row] = verdict
            elif self._config.on_error == "raise":
                raise RewardError(_story(verdict, task))
            else:
                failed[row] = True
        total = values @ np.array(self._config.weights or [1.0] * values.shape[1])
        names = self._config.names if self._config.functions else []
        parts = {name: values[:, column].astype(np.float32) for column, name in enumerate(names)}
        return Scores(total.astype(np.float32), parts, failed)

    def close(self) -> None:
        """End the workers; a second call does nothing."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _judge(self, tasks: Sequence[Task]) -> list[list[float] | Failed]:
        if self._pool is not None:
            return self._pool.judge(tasks)
        verdicts = []
        for task in tasks:
            verdicts.append(judge(self._functions, task))
            self._beat()
        return verdicts

    def _turns(self, rollouts: RolloutBatch) -> list[tuple[str, ...]]:
        """Each response by turns; of a single one where there is no environment."""
        if rollouts.generated is not None:
            assert self._dialogue is not None
            return [self._dialogue.texts(rollout) for rollout in rollouts]
        ids = [rollout.response_ids.tolist() for rollout in rollouts]
        return [(text,) for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @staticmethod
    def _task(rollouts: RolloutBatch, row: int, turns: tuple[str, ...], examples: Sequence[Example]) -> Task:
        example, rollout = examples[rollouts.prompt_index[row]], rollouts[row]
        spoken = turns if rollout.generated is not None else ()
        sample = Sample(example.text, rollout.finish_reason == "stop", rollout.num_generated, spoken)
        return Task(turns[-1], example.answer, sample)


def _story(failed: Failed, task: Task) -> str:
    return (
        f"reward: {failed.function} failed on a response: {failed.reason.strip()}\n"
        f"The prompt was {task.sample.prompt[:200]!r}, the answer {task.answer[:200]!r}, the response "
        f"{task.response[:500]!r}. reward.on_error=zero gives such responses 0 and goes on."
    )
