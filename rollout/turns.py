"""Rollouts of several turns: the policy speaks, an environment answers, the policy goes on.

An environment is one function, environment(rollout) -> observation or done. Its observations stand in the response,
between the tokens that the policy sampled; `generated` tells the two apart, and no loss is computed of them.

    def calculator(rollout):
        return "= 7\\n" if rollout.num_generated < 20 else None

    batch, metrics = generate_turns(engine, prompts, sampling, one_by_one(calculator), max_turns=4)

A phase is made of rounds, each of them one `generate` of the next turn of every row that goes on. All ranks of a
tensor-parallel group make as many rounds: after each they tell each other whether they have rows left. What a turn may
hold is a matter of counts, never of clocks. A row's context is computed again in each round, but for what the prefix
cache has of it: all whole blocks, since nothing empties it within a phase (`rollout.enable_prefix_caching`).

A row may also be cut at the end of a phase and gone on with in a later one, with other weights (partial rollouts, as in
Kimi k1.5, arXiv:2501.12599, sec. 2.6.2): give its `Draft` an allowance of tokens, and hand it to `advance_drafts` again
when the engine has its new weights. Each token keeps the log-prob and the version of the weights that sampled it.

A row keeps its stream of random numbers from turn to turn, and from phase to phase. A token's draw is a function of
stream and position in the whole sequence, observations counted, so that turn k draws other numbers than turn 1, and the
tokens do not depend on which rows are in a round, on which rank, or in which order; nor, while the weights stay, on
where a row was cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout.config import SamplingConfig
from rollout.throughput import merge_rounds, turn_metrics
from rollout.types import Prompt, Rollout, RolloutBatch

if TYPE_CHECKING:
    from rollout.engine import RolloutEngine


class Cut:
    """The type of `CUT`."""

    def __repr__(self) -> str:
        return "CUT"


CUT = Cut()
"""An environment's answer that ends a rollout as a limit does: it does not count as finished."""

Observation = str | Sequence[int] | Cut | None
"""Text (tokenised as it stands) or token ids; None where the rollout is done."""

Observe = Callable[[Sequence[Rollout]], Sequence[Observation]]
"""Answers the rollouts whose last turn ended by itself; called by each rank with its own rows, and only with some."""


@dataclass
class Draft:
    """A row in the making.

    Attributes:
        prompt_ids: (prompt_tokens,) int32.
        prompt_index: of the prompt among those that this rank was given.
        stream: the key of its random numbers; None before its first turn.
        response_ids: (response_tokens,) int32, so far.
        logprobs: (response_tokens,) float32; 0 where not generated.
        generated: (response_tokens,) bool.
        versions: (response_tokens,) int32, of the weights that the engine had.
        allowance: tokens that it may still sample in this phase; None: as many as it likes.
        turns: that the policy has ended by itself.
        finished: True where the rollout ended by itself.
        done: True where nothing is to come.
    """

    prompt_ids: np.ndarray
    prompt_index: int
    stream: int | None = None
    response_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    generated: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    versions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    allowance: int | None = None
    turns: int = 0
    finished: bool = False
    done: bool = False

    @property
    def context(self) -> np.ndarray:
        """(tokens,) int32: what the next turn follows."""
        return np.concatenate([self.prompt_ids, self.response_ids])

    @property
    def length(self) -> int:
        """Of prompt and response, in tokens."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_generated(self) -> int:
        """Tokens that the policy sampled."""
        return int(self.generated.sum())

    @property
    def goes_on(self) -> bool:
        """True if there is more to come in this phase."""
        return not self.done and self.allowance != 0

    def append(self, ids: np.ndarray, version: int, logprobs: np.ndarray | None = None) -> None:
        """Take in a turn, `ids` (tokens,) int32 and `logprobs` (tokens,) float32; with no log-probs an observation."""
        self.response_ids = np.concatenate([self.response_ids, ids])
        self.logprobs = np.concatenate(
            [self.logprobs, np.zeros(len(ids), np.float32) if logprobs is None else logprobs]
        )
        self.generated = np.concatenate([self.generated, np.full(len(ids), logprobs is not None)])
        self.versions = np.concatenate([self.versions, np.full(len(ids), version, np.int32)])

    def view(self, version: int) -> Rollout:
        """As the environment sees it."""
        return Rollout(
            self.prompt_ids, self.response_ids, self.logprobs, "stop", self.prompt_index, version, self.generated
        )


def one_by_one(environment: Callable[[Rollout], Observation]) -> Observe:
    """The environment, asked in this process about one rollout after another."""
    return lambda rollouts: [environment(rollout) for rollout in rollouts]


def generate_turns(
    engine: "RolloutEngine",
    prompts: Sequence[Prompt],
    sampling: SamplingConfig | None,
    observe: Observe,
    max_turns: int,
    *,
    seed: int | None = None,
) -> tuple[RolloutBatch, dict[str, float]]:
    """`engine.generate` with an environment; all ranks of the group call it together.

    A row goes on while its turn ended by itself (a stop token), the environment answers, and there is room for the
    answer and a token more: of `sampling.max_tokens`, which counts the tokens of all turns without the observations,
    and of rollout.max_model_len, which counts everything. Where there is no room the answer is left out, and the row
    counts as cut. So a response always ends with a sampled token.

    Args:
        prompts: this rank's own.
        sampling: the same on every rank of the group.
        observe: the environment, of as many rollouts as need an answer; see `one_by_one`.
        max_turns: of the policy, at most; the environment is not asked after the last.
        seed: as of `engine.generate`.

    Returns:
        This rank's share, sample j of prompt i in row i * n + j, with `generated`; and the group's rollout/* metrics.

    Raises:
        ValueError: as `engine.generate`; or if an observation is empty.
    """
    sampling = sampling or SamplingConfig()
    drafts = []
    for index, prompt in enumerate(prompts):
        ids = np.asarray(engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int32)
        drafts += [Draft(ids, index) for _ in range(sampling.n)]
    metrics = advance_drafts(engine, drafts, sampling, observe, max_turns, seed)
    return join_drafts(drafts, engine.version), metrics


def advance_drafts(
    engine: "RolloutEngine",
    drafts: Sequence[Draft],
    sampling: SamplingConfig,
    observe: Observe,
    max_turns: int,
    seed: int | None,
) -> dict[str, float]:
    """Bring this rank's rows to their ends, or to the end of their allowance, in place; all ranks of the group call it
    together. Fresh rows of one prompt stand together and share its array.

    Returns:
        The group's rollout/* metrics: lengths and the like are of the rows that ended.
    """
    rounds: list[dict[str, float]] = []
    waiting = [draft for draft in drafts if draft.goes_on]
    while True:
        _next_turn(engine, waiting, sampling, seed)
        rounds.append(engine.metrics)
        _answer(engine, [draft for draft in waiting if draft.finished], sampling, observe, max_turns)
        waiting = [draft for draft in waiting if draft.goes_on]
        if not engine.any_rank(bool(waiting)):
            break
    return merge_rounds(rounds) | turn_metrics(_figures(engine, [draft for draft in drafts if draft.done]))


def join_drafts(drafts: Sequence[Draft], version: int) -> RolloutBatch:
    """The rows as one batch, in their order."""

    def joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)

    versions = joined([draft.versions for draft in drafts], np.int32)
    return RolloutBatch(
        prompt_ids=joined([draft.prompt_ids for draft in drafts], np.int32),
        prompt_lengths=np.array([len(draft.prompt_ids) for draft in drafts], np.int32),
        response_ids=joined([draft.response_ids for draft in drafts], np.int32),
        response_lengths=np.array([len(draft.response_ids) for draft in drafts], np.int32),
        logprobs=joined([draft.logprobs for draft in drafts], np.float32),
        finished=np.array([draft.finished for draft in drafts], bool),
        prompt_index=np.array([draft.prompt_index for draft in drafts], np.int32),
        version=version,
        generated=joined([draft.generated for draft in drafts], bool),
        versions=versions if (versions != version).any() else None,
        streams=np.array([draft.stream for draft in drafts], np.int64),
    )


def _next_turn(engine: "RolloutEngine", drafts: Sequence[Draft], sampling: SamplingConfig, seed: int | None) -> None:
    """One `generate`: the fresh rows of a prompt as its samples, each of the others as a prompt of its own."""
    groups: list[list[Draft]] = []
    for draft in drafts:
        last = groups[-1][-1] if groups else None
        if draft.stream is None and last is not None and last.stream is None and last.prompt_ids is draft.prompt_ids:
            groups[-1].append(draft)
        else:
            groups.append([draft])
    batch = engine.generate(
        [group[0].context.tolist() for group in groups],
        sampling,
        seed=seed,
        samples=[len(group) for group in groups],
        max_tokens=[_room(group[0], sampling, engine.max_model_len) for group in groups],
        streams=[group[0].stream for group in groups],
    )
    assert batch.streams is not None
    for row, draft in enumerate(drafts):
        turn, left = batch[row], _left(draft, sampling, engine.max_model_len)
        draft.append(turn.response_ids, engine.version, turn.logprobs)
        draft.stream = int(batch.streams[row])
        draft.finished = turn.finish_reason == "stop"
        draft.turns += draft.finished
        if draft.allowance is not None:
            draft.allowance -= len(turn.response_ids)
        draft.done = not draft.finished and len(turn.response_ids) == left


def _left(draft: Draft, sampling: SamplingConfig, max_model_len: int) -> int:
    """Tokens that the row may still sample, in this phase or later ones."""
    return min(sampling.max_tokens - draft.num_generated, max_model_len - draft.length)


def _room(draft: Draft, sampling: SamplingConfig, max_model_len: int) -> int:
    """Tokens that the row's next turn may have; of a fresh row `generate` itself sees to the engine's limit."""
    left = sampling.max_tokens if draft.stream is None else _left(draft, sampling, max_model_len)
    return left if draft.allowance is None else min(left, draft.allowance)


def _answer(
    engine: "RolloutEngine", drafts: Sequence[Draft], sampling: SamplingConfig, observe: Observe, max_turns: int
) -> None:
    """Append the environment's answers to rows whose turn ended by itself, or end them."""
    asking = [draft for draft in drafts if draft.turns < max_turns]
    for draft in drafts:
        draft.done = draft.turns >= max_turns
    if not asking:
        return
    observations = observe([draft.view(engine.version) for draft in asking])
    for draft, observation in zip(asking, observations, strict=True):
        if observation is None or isinstance(observation, Cut):
            draft.done, draft.finished = True, observation is None
            continue
        if isinstance(observation, str):
            observation = engine.tokenizer.encode(observation, add_special_tokens=False)
        ids = np.asarray(observation, np.int32)
        if not len(ids):
            raise ValueError("the environment returned an empty observation; give text, or None where it is done")
        draft.finished = False
        draft.done = _left(draft, sampling, engine.max_model_len - len(ids)) < 1
        if not draft.done:
            draft.append(ids, engine.version)


def _figures(engine: "RolloutEngine", drafts: Sequence[Draft]) -> np.ndarray:
    """(rows of the group, 4) int64: tokens generated, tokens observed, turns, whether it finished."""
    ours = [
        (draft.num_generated, len(draft.response_ids) - draft.num_generated, _turns(draft), draft.finished)
        for draft in drafts
    ]
    return np.concatenate([np.array(each, np.int64).reshape(-1, 4) for each in engine.everyones(ours)])


def _turns(draft: Draft) -> int:
    """Turns of the policy, one that was cut included."""
    starts = draft.generated & ~np.concatenate([[False], draft.generated[:-1]])
    return int(starts.sum())
