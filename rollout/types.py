"""What goes into the engine and what comes out: prompts, and responses as packed arrays."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Prompt = str | Sequence[int]
"""Text, tokenised as it stands (apply a chat template yourself), or token ids."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Rollout:
    """One sequence of a RolloutBatch: views, not copies.

    Attributes:
        prompt_ids: (prompt_tokens,) int32.
        response_ids: (response_tokens,) int32; ends with the stop token where finish_reason is "stop".
        logprobs: (response_tokens,) float32, natural log, of each response token when it was sampled; 0 where it was
            not.
        finish_reason: "stop" if the response ended by itself, "length" if a limit cut it.
        prompt_index: which of the prompts given by this rank it answers.
        version: of the weights that made it; -1 before the first sync.
        generated: (response_tokens,) bool; True = sampled by the policy, False = given by an environment
            (rollout/turns.py). None: all were sampled.
        versions: (response_tokens,) int32, of the weights that made each token, where the response was carried from
            one phase to another; the last ones are `version`. None: all are.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    prompt_index: int
    version: int
    generated: np.ndarray | None = None
    versions: np.ndarray | None = None

    @property
    def num_generated(self) -> int:
        """Response tokens that the policy sampled."""
        return len(self.response_ids) if self.generated is None else int(self.generated.sum())


OnStep = Callable[[Sequence[tuple[int, Rollout]]], None]
"""Given the responses that ended in a step of a phase, each with its row in the RolloutBatch to come; often none."""


@dataclass(frozen=True)
class RolloutBatch:
    """This rank's share of one phase of generation, packed without padding.

    With `n` samples a prompt, sample j of prompt i stands at row i * n + j. A response may hold tokens that an
    environment gave: `generated` tells them apart.

    Attributes:
        prompt_ids: (sum of prompt_lengths,) int32.
        prompt_lengths: (batch,) int32, in tokens.
        response_ids: (sum of response_lengths,) int32.
        response_lengths: (batch,) int32, in tokens, the stop token included.
        logprobs: (sum of response_lengths,) float32, natural log; 0 for tokens that were not sampled.
        finished: (batch,) bool; True where the response ended by itself, False where a limit cut it.
        prompt_index: (batch,) int32, into the prompts given by this rank.
        version: of the weights that made all of them; -1 before the first sync.
        generated: (sum of response_lengths,) bool; True = sampled by the policy, False = given by an environment.
            None: all were sampled.
        streams: (batch,) int64, the key of each row's random numbers, with which `RolloutEngine.generate` goes on
            with the row; None where nobody can.
        versions: (sum of response_lengths,) int32, of the weights that made each token, where responses were carried
            from one phase to another; `version` is then that of the last phase. None: all are `version`.

    >>> batch = RolloutBatch(
    ...     prompt_ids=np.array([5, 6, 7], np.int32), prompt_lengths=np.array([2, 1], np.int32),
    ...     response_ids=np.array([8, 9], np.int32), response_lengths=np.array([1, 1], np.int32),
    ...     logprobs=np.array([-0.5, -0.25], np.float32), finished=np.array([True, False]),
    ...     prompt_index=np.array([0, 1], np.int32), version=3)
    >>> batch[1].prompt_ids.tolist(), batch[1].response_ids.tolist(), batch[1].finish_reason
    ([7], [9], 'length')
    """

    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    response_ids: np.ndarray
    response_lengths: np.ndarray
    logprobs: np.ndarray
    finished: np.ndarray
    prompt_index: np.ndarray
    version: int
    generated: np.ndarray | None = None
    streams: np.ndarray | None = None
    versions: np.ndarray | None = None

    def __post_init__(self) -> None:
        # Row starts, once: indexing a row must not sum the lengths again.
        object.__setattr__(self, "_prompt_starts", np.concatenate(([0], np.cumsum(self.prompt_lengths))))
        object.__setattr__(self, "_response_starts", np.concatenate(([0], np.cumsum(self.response_lengths))))

    @property
    def generated_lengths(self) -> np.ndarray:
        """(batch,) int32: the tokens of each response that the policy sampled."""
        if self.generated is None:
            return self.response_lengths
        sums = np.concatenate(([0], np.cumsum(self.generated, dtype=np.int32)))
        return np.diff(sums[self._response_starts])  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.response_lengths)

    def __getitem__(self, row: int) -> Rollout:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a batch of {len(self)}")
        row %= len(self)
        prompt = slice(*self._prompt_starts[row : row + 2])  # type: ignore[attr-defined]
        response = slice(*self._response_starts[row : row + 2])  # type: ignore[attr-defined]
        return Rollout(
            prompt_ids=self.prompt_ids[prompt],
            response_ids=self.response_ids[response],
            logprobs=self.logprobs[response],
            finish_reason="stop" if self.finished[row] else "length",
            prompt_index=int(self.prompt_index[row]),
            version=self.version,
            generated=None if self.generated is None else self.generated[response],
            versions=None if self.versions is None else self.versions[response],
        )

    def __iter__(self) -> Iterator[Rollout]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class Asked:
    """One prompt of a call of `generate`, as every rank of the group is told of it.

    Attributes:
        prompt_ids: (prompt_tokens,) int32.
        samples: responses to it.
        max_tokens: of each of them.
        stream: the key of the random numbers of the one sample that goes on with it; None draws each sample's.
    """

    prompt_ids: np.ndarray
    samples: int
    max_tokens: int
    stream: int | None = None
