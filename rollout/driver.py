"""The step loop of one phase: admit a batch, keep the device fed, collect tokens and log-probs as arrays."""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from rollout.agreement import Agreement, RanksDisagree
from rollout.throughput import EXECUTE, UPDATE, WAIT, PhaseTimeline

STOP, LENGTH = 0, 1
LOOK_AGAIN_S = 0.5  # how soon who waits for a step looks whether the ranks disagree


@dataclass
class Collected:
    """The tokens of one phase, a row a sequence.

    Attributes:
        token_ids: (sequences, max_tokens) int32; row r is valid up to lengths[r].
        logprobs: (sequences, max_tokens) float32, natural log, of the sampled token.
        lengths: (sequences,) int32, in tokens.
        finished: (sequences,) bool; True where the response ended by itself.
        done: (sequences,) bool; True where the engine reported the end of the sequence.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    done: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.done = np.zeros(len(self.lengths), bool)
        self._request_ids: list[str] | None = None
        self._rows = np.zeros(0, np.int64)

    @classmethod
    def empty(cls, num_sequences: int, max_tokens: int) -> "Collected":
        """Room for so many sequences of so many tokens: arrays (sequences, tokens) and (sequences,), all zero."""
        return cls(
            token_ids=np.zeros((num_sequences, max_tokens), np.int32),
            logprobs=np.zeros((num_sequences, max_tokens), np.float32),
            lengths=np.zeros(num_sequences, np.int32),
            finished=np.zeros(num_sequences, bool),
        )

    def digest(self) -> str:
        """SHA-256 of all tokens, log-probs and lengths, bit for bit."""
        arrays = (self.token_ids, self.logprobs, self.lengths)
        return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def add(self, update: Any) -> list[int]:
        """Take in one step: a `rollout.backend.scheduler.StepUpdate`, whose request ids are row numbers.

        Returns:
            The rows that ended in it.

        Raises:
            RuntimeError: if a sequence ended otherwise than by a stop token or a length limit.
            FloatingPointError: if a log-prob is no finite number.
        """
        for index, reason in update.finished:
            if reason not in (STOP, LENGTH):
                raise RuntimeError(
                    f"sequence {update.request_ids[index]} ended for reason {reason} of vLLM's FinishReason: "
                    "its tokens are not usable"
                )
        if not np.isfinite(update.logprobs).all():
            index = int(np.flatnonzero(~np.isfinite(update.logprobs))[0])
            row = int(update.request_ids[index])
            raise FloatingPointError(
                f"token {self.lengths[row]} of sequence {row} has the log-prob {update.logprobs[index]}: the model's "
                "logits are not finite; look at the weights that were synced last"
            )
        rows = self._rows_of(update.request_ids)
        positions = self.lengths[rows]
        self.token_ids[rows, positions] = update.token_ids
        self.logprobs[rows, positions] = update.logprobs
        self.lengths[rows] = positions + 1
        for index, reason in update.finished:
            self.finished[rows[index]] = reason == STOP
            self.done[rows[index]] = True
        return [int(rows[index]) for index, _ in update.finished]

    def _rows_of(self, request_ids: list[str]) -> np.ndarray:
        """(k,) int64. The list is the same object while the sequences are the same."""
        if request_ids is not self._request_ids:
            self._request_ids = request_ids
            self._rows = np.array(request_ids, np.int64)
        return self._rows


@dataclass
class Phase:
    """What one run of `drive` did, beside the tokens."""

    timeline: PhaseTimeline
    preemptions: int = 0
    peak_kv_cache_usage: float = 0.0


def drive(
    core: Any,
    requests: Sequence[Any],
    sizes: Sequence[int],
    collected: Collected,
    phase: Phase,
    agreement: Agreement,
    beat: Callable[[], None],
    on_step: Callable[[list[int]], None] | None = None,
) -> None:
    """Run all requests to their ends.

    With a queue depth of 2, step i+1 is scheduled and queued while step i runs, and only then is the output of step i
    waited for. A sequence that ends in step i has by then been scheduled once too often; the scheduler discards that
    token.

    Args:
        core: `rollout.backend.core.Core`.
        requests: from `make_requests`; their ids are rows of `collected`.
        sizes: samples of each prompt, in order; they stand together.
        agreement: is told of every step; its phase is finished by the caller.
        beat: called at every step that has ended.
        on_step: likewise, with the rows of `collected` that ended in it; the device is at work on the next step then.

    Raises:
        RanksDisagree: if another rank scheduled or sampled something else.
        RuntimeError: if a sequence ended otherwise than by a stop token or a length limit.
        FloatingPointError: if a log-prob is no finite number.
        Exception: whatever the execute thread or `on_step` raised, with its traceback.
    """
    scheduler, steps = core.scheduler, Steps(core, collected, phase, agreement)
    in_flight: deque[Step] = deque()
    core.groups.admit(requests, sizes)
    core.executor.observer = phase.timeline.launch_observer()
    try:
        while scheduler.has_requests() or in_flight:
            if scheduler.has_requests():
                in_flight.append(steps.schedule_next())
                if len(in_flight) < core.queue_depth:
                    continue
            oldest = in_flight.popleft()
            output = steps.wait_for(oldest, next_step=in_flight[-1] if in_flight else None)
            arrived = perf_counter()
            ended = steps.take_in(oldest, output)
            beat()
            if on_step is not None:
                on_step(ended)
            phase.timeline.record(UPDATE, oldest.number, arrived, perf_counter())
    except RanksDisagree:
        raise
    except Exception:
        agreement.look()  # ranks that run different steps spoil each other's numbers: that is then what to say
        raise
    finally:
        core.executor.observer = None
    assert collected.done.all(), "the scheduler is idle but sequences have not ended"


class Step(NamedTuple):
    """One that is under way.

    Attributes:
        number: of this phase, from 0.
        scheduled: vLLM's SchedulerOutput.
        future: `rollout.backend.executor.StepFuture`.
    """

    number: int
    scheduled: Any
    future: Any


class Steps:
    """What is done with each step of a phase, by turns; see `drive` for the arguments."""

    def __init__(self, core: Any, collected: Collected, phase: Phase, agreement: Agreement) -> None:
        self._core, self._collected, self._phase, self._agreement = core, collected, phase, agreement
        self._next = 0

    def schedule_next(self) -> Step:
        """Schedule a step and queue it on the execute thread; returns at once."""
        scheduler, phase = self._core.scheduler, self._phase
        begin = perf_counter()
        scheduled = scheduler.schedule()
        self._core.groups.after_schedule()
        order = getattr(scheduled, "order", None)
        self._agreement.scheduled(scheduled.num_scheduled_tokens, scheduler.positions(scheduled), order)
        live, tokens = len(scheduled.num_scheduled_tokens), scheduled.total_num_scheduled_tokens
        phase.timeline.record_schedule(self._next, begin, perf_counter(), live, tokens)
        step = Step(self._next, scheduled, self._core.executor.submit_step(scheduled))
        phase.preemptions += len(scheduled.preempted_req_ids or ())
        phase.peak_kv_cache_usage = max(phase.peak_kv_cache_usage, scheduler.kv_cache_manager.usage)
        self._next += 1
        return step

    def wait_for(self, step: Step, next_step: Step | None) -> Any:
        """The step's output, once the next one is launched, too.

        Ranks that run different steps wait for each other for ever, unless one looks.

        Raises:
            RanksDisagree: if this rank or another has found a difference meanwhile.
            Exception: whatever the execute thread raised.
        """
        begin = perf_counter()
        while not step.future.wait(LOOK_AGAIN_S):
            self._agreement.look()
        output = step.future.result()
        # The execute thread may still be preparing the next step; two threads at work at once would hand the
        # interpreter's lock to and fro, and both be late.
        while next_step is not None and not next_step.future.launched.wait(LOOK_AGAIN_S):
            self._agreement.look()
        self._phase.timeline.record(WAIT, step.number, begin, perf_counter())
        if step.future.device_span is not None:
            self._phase.timeline.record(EXECUTE, step.number, *step.future.device_span)
        return output

    def take_in(self, step: Step, output: Any) -> list[int]:
        """Give its tokens to the scheduler, the agreement and `collected`; the rows that ended in it."""
        update = self._core.scheduler.take_output(step.scheduled, output)
        self._agreement.sampled(update)
        return self._collected.add(update)
