"""Spans and counters of one phase of generation, and the named rates made of them.

A phase is one call of `generate`. Two threads write its timeline: the main thread schedules, waits and updates; the
execute thread launches. Every kind of span has one writing thread and an array of its own, so nothing is locked, and
a step costs a few stores whatever the batch size. All reading happens after the phase, when both threads are quiet.

Names and meanings for the user: docs/metrics.md.
"""

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

# Kinds of span, and the thread that writes them.
SCHEDULE = 0  # main: choose the step's sequences and tokens
LAUNCH = 1  # execute: prepare the inputs and launch; where execution blocks, as on the CPU, run the step
WAIT = 2  # main: stand still for the step's output
UPDATE = 3  # main: append tokens, end sequences
EXECUTE = 4  # execute: the device runs the step; recorded only where that is not LAUNCH (a device that runs ahead)
_NUM_KINDS = 5

TAIL_SHARE = 0.25  # of the largest number of live sequences: below it a step belongs to the phase's tail
SUMMED = (
    "rollout/generated_tokens",
    "rollout/sequences",
    "rollout/preemptions",
    "rollout/observation_tokens",
    "rollout/environment_failed",
)
"""Over tensor-parallel groups; of the next ones the largest group's counts."""
LARGEST = ("rollout/seconds", "rollout/decode_steps", "rollout/kv_cache_usage", "rollout/environment_seconds")


class PhaseTimeline:
    """Records when each step of one phase was scheduled, launched, waited for and updated.

    Steps are numbered from 0 within the phase. Times are `time.perf_counter()` in seconds. A step or span that was
    never recorded stays unknown and enters no figure.

    Args:
        capacity: steps that fit before an array doubles.

    >>> timeline = PhaseTimeline()
    >>> timeline.record_schedule(0, 0.9, 1.0, live_sequences=2, scheduled_tokens=10)
    >>> timeline.record(LAUNCH, 0, 1.0, 1.5)
    >>> timeline.num_steps, timeline.spans(LAUNCH).tolist(), timeline.live_sequences.tolist()
    (1, [[1.0, 1.5]], [2])
    """

    def __init__(self, capacity: int = 1024) -> None:
        assert capacity >= 1, capacity
        self._spans = [np.full((capacity, 2), np.nan) for _ in range(_NUM_KINDS)]
        self._counts = np.full((capacity, 2), -1, np.int64)
        # Rows in use, one slot a writer: two threads never store to the same slot.
        self._used = [0] * _NUM_KINDS

    def record(self, kind: int, step: int, start: float, end: float) -> None:
        """Store one span of one step; called only by the thread that owns this kind.

        Args:
            kind: SCHEDULE, LAUNCH, WAIT, UPDATE or EXECUTE.
            step: of this phase, from 0.
            start: perf_counter seconds.
            end: perf_counter seconds.
        """
        assert step >= 0, step
        spans = self._spans[kind]
        if step >= len(spans):
            spans = self._spans[kind] = _grown(spans, step, np.nan)
        spans[step, 0] = start
        spans[step, 1] = end
        if step >= self._used[kind]:
            self._used[kind] = step + 1

    def record_schedule(self, step: int, start: float, end: float, live_sequences: int, scheduled_tokens: int) -> None:
        """Store one step's SCHEDULE span and what it was scheduled with; main thread.

        Args:
            step: of this phase, from 0.
            start: perf_counter seconds.
            end: perf_counter seconds.
            live_sequences: in the running batch at this step (waiting ones not counted).
            scheduled_tokens: that the step processes, prompt tokens included.
        """
        self.record(SCHEDULE, step, start, end)
        if step >= len(self._counts):
            self._counts = _grown(self._counts, step, -1)
        self._counts[step, 0] = live_sequences
        self._counts[step, 1] = scheduled_tokens

    def launch_observer(self) -> Callable[[float, float], None]:
        """A function for the execute thread to call with the start and end of each launch, in step order from 0.

        >>> timeline = PhaseTimeline()
        >>> observe = timeline.launch_observer()
        >>> observe(1.0, 1.5), observe(2.0, 2.5), timeline.spans(LAUNCH)[1].tolist()
        (None, None, [2.0, 2.5])
        """
        steps = count()
        return lambda start, end: self.record(LAUNCH, next(steps), start, end)

    @property
    def num_steps(self) -> int:
        """Steps of which anything was recorded, up to the last one."""
        return max(self._used)

    def spans(self, kind: int) -> np.ndarray:
        """Start and end of every step: (num_steps, 2) float64, perf_counter seconds, NaN where not recorded."""
        return _rows(self._spans[kind], self.num_steps, np.nan)

    @property
    def live_sequences(self) -> np.ndarray:
        """(num_steps,) int64, -1 where not recorded."""
        return _rows(self._counts, self.num_steps, -1)[:, 0]

    @property
    def scheduled_tokens(self) -> np.ndarray:
        """(num_steps,) int64, prompt tokens included, -1 where not recorded."""
        return _rows(self._counts, self.num_steps, -1)[:, 1]


def phase_metrics(
    timeline: PhaseTimeline,
    seconds: float,
    num_sequences: int,
    response_lengths: np.ndarray,
    finished: np.ndarray,
    kv_cache_usage_peak: float | None,
    preemptions: int,
) -> dict[str, float]:
    """Name the rates of one phase of one tensor-parallel group.

    Every rank of a group runs the same scheduler and emits the same tokens, so pass the GROUP's sequences, not a
    rank's share, and use one rank's result a group: that counts each token once. The times are this rank's own. For
    several groups see `merge_groups`.

    Let busy spans be those of `busy_spans`, and the decode time the seconds from the first one's start to the last
    one's end. A name is left out where its figure cannot be known: the medians, fractions of time and lengths of a
    phase without steps or sequences are absent, not zero.

    - rollout/generated_tokens: sum of response_lengths, stop tokens included.
    - rollout/seconds: as given: from the moment at which the prompts of all ranks are there to that at which the
      responses are, without waiting for other replicas (`rollout.balance`).
    - rollout/generated_tokens_per_s: generated_tokens / seconds.
    - rollout/sequences: responses generated.
    - rollout/decode_steps: steps launched with at least one token to process, those that process prompts included. (An
      asynchronous scheduler launches a few empty ones at the end, while the last tokens are on their way.)
    - rollout/host_gap_fraction: seconds between consecutive busy spans, in which nothing ran / decode time.
    - rollout/{schedule,launch,wait,update}_ms: median length of that span over the steps that have one, in ms.
    - rollout/tail_fraction: let peak be the most sequences ever live in one step; the tail begins after the last
      step with at least a quarter of peak live. Seconds from the first tail step's start to the end / decode time.
      Measured against the peak, so that neither a long waiting queue nor the ramp-up counts as tail.
    - rollout/kv_cache_usage: the phase's peak, 0 to 1, as given.
    - rollout/preemptions: sequences that lost their KV blocks and were recomputed, as given.
    - rollout/response_tokens_{mean,p50,p99}: of response_lengths; percentiles interpolate linearly.
    - rollout/truncated_fraction: share of responses that a limit cut.

    Args:
        timeline: of the phase, both threads quiet.
        seconds: that the phase took.
        num_sequences: responses of the whole group.
        response_lengths: (num_sequences,) int, in tokens.
        finished: (num_sequences,) bool; True where the response ended by itself, False where a limit cut it.
        kv_cache_usage_peak: share of KV blocks in use at the fullest step; None if unknown.
        preemptions: count over the phase.

    >>> timeline = PhaseTimeline()
    >>> for step, start in enumerate([0.0, 2.0]):
    ...     timeline.record(LAUNCH, step, start, start + 1.5)
    >>> metrics = phase_metrics(timeline, 4.0, 2, np.array([1, 2]), np.array([True, False]), 0.1, 0)
    >>> metrics["rollout/generated_tokens_per_s"]  # 3 tokens / 4 s
    0.75
    >>> round(metrics["rollout/host_gap_fraction"], 4)  # 0.5 s between the steps / 3.5 s
    0.1429
    >>> "rollout/wait_ms" in metrics  # never recorded
    False
    """
    assert len(response_lengths) == len(finished) == num_sequences, (len(response_lengths), num_sequences)
    generated_tokens = int(np.sum(response_lengths))
    launched = _recorded(timeline.spans(LAUNCH)) & (timeline.scheduled_tokens != 0)
    metrics: dict[str, float] = {
        "rollout/generated_tokens": generated_tokens,
        "rollout/seconds": seconds,
        "rollout/sequences": num_sequences,
        "rollout/decode_steps": int(launched.sum()),
        "rollout/preemptions": preemptions,
    }
    if seconds > 0:
        metrics["rollout/generated_tokens_per_s"] = generated_tokens / seconds
    if kv_cache_usage_peak is not None:
        metrics["rollout/kv_cache_usage"] = kv_cache_usage_peak
    for name, kind in (("schedule", SCHEDULE), ("launch", LAUNCH), ("wait", WAIT), ("update", UPDATE)):
        spans = timeline.spans(kind)
        spans = spans[_recorded(spans)]
        if len(spans):
            metrics[f"rollout/{name}_ms"] = float(np.median(spans[:, 1] - spans[:, 0])) * 1e3
    metrics |= _device_fractions(timeline)
    if num_sequences:
        metrics["rollout/response_tokens_mean"] = generated_tokens / num_sequences
        metrics["rollout/response_tokens_p50"] = float(np.percentile(response_lengths, 50))
        metrics["rollout/response_tokens_p99"] = float(np.percentile(response_lengths, 99))
        metrics["rollout/truncated_fraction"] = float(np.mean(~np.asarray(finished, bool)))
    return metrics


def overlap_fraction(timeline: PhaseTimeline) -> float | None:
    """Share of the main thread's work that was hidden behind the device: proof that asynchronous scheduling ran.

    Seconds of SCHEDULE and UPDATE spans that fall inside a busy span of ANOTHER step / seconds of SCHEDULE and UPDATE
    spans. A synchronous run gives 0: nothing runs while the main thread works. A perfect asynchronous run gives
    nearly 1: only the first step's schedule and the last ones' update are exposed.

    Returns:
        0 to 1 of this rank, or None where either side was never recorded.

    >>> timeline = PhaseTimeline()
    >>> timeline.record(LAUNCH, 0, 0.0, 1.0)
    >>> timeline.record(SCHEDULE, 1, 0.5, 1.5)  # half of it while step 0 runs
    >>> overlap_fraction(timeline)
    0.5
    """
    busy, busy_steps = busy_spans(timeline)
    host = np.stack([timeline.spans(SCHEDULE), timeline.spans(UPDATE)], axis=1)  # (num_steps, 2 kinds, 2 ends)
    steps, kinds = np.nonzero(_recorded(host))
    start, end = host[steps, kinds].T
    host_seconds = float((end - start).sum())
    if not len(busy) or host_seconds <= 0:
        return None
    # Busy seconds before time t are piecewise linear: they grow at rate 1 within a busy span and stand still between.
    knots = busy.reshape(-1)
    busy_before = np.concatenate(([0.0], np.cumsum(np.diff(knots) * (np.arange(len(knots) - 1) % 2 == 0))))
    within_any = np.interp(end, knots, busy_before) - np.interp(start, knots, busy_before)
    # Take away the step's own busy span: work on a step during that step hides nothing of another.
    own = np.full((timeline.num_steps, 2), np.nan)
    own[busy_steps] = busy
    own_start, own_end = own[steps].T
    within_own = np.nan_to_num(np.clip(np.minimum(end, own_end) - np.maximum(start, own_start), 0.0, None))
    return float((within_any - within_own).sum()) / host_seconds


def busy_spans(timeline: PhaseTimeline) -> tuple[np.ndarray, np.ndarray]:
    """When the device was at work: the EXECUTE spans, or the LAUNCH spans where no EXECUTE was recorded.

    The device takes one step at a time in order, so a span that begins before its predecessor ended is cut to begin
    there. LAUNCH spans stand in for the device where a launch blocks until the step is done (the CPU); where it
    returns early, record EXECUTE, or the gaps come out too large.

    Returns:
        (num_busy, 2) float64 perf_counter seconds, disjoint and in order; (num_busy,) int64 their steps. This rank.
    """
    spans = timeline.spans(EXECUTE)
    if not _recorded(spans).any():
        spans = timeline.spans(LAUNCH)
    steps = np.nonzero(_recorded(spans))[0]
    busy = spans[steps].copy()
    if len(busy):
        end_so_far = np.maximum.accumulate(busy[:, 1])
        busy[1:, 0] = np.maximum(busy[1:, 0], end_so_far[:-1])
        busy[:, 1] = end_so_far
    return busy, steps


def merge_groups(groups: Sequence[dict[str, float]]) -> dict[str, float]:
    """Merge the phase metrics of several tensor-parallel groups into the job's: one dict a group, not a rank.

    Counts add up. The groups run side by side, so seconds, decode_steps and kv_cache_usage are those of the largest,
    and the rate is all tokens / the longest seconds. Lengths and truncated_fraction are means weighted by sequences
    (for p50 and p99 an approximation that lies between the groups' own). Everything else is a plain mean. Of several
    groups there is rollout/imbalance, too: the longest seconds / their mean, 1 where no group waits for another.

    >>> a = {"rollout/generated_tokens": 100, "rollout/seconds": 4.0, "rollout/generated_tokens_per_s": 25.0}
    >>> b = {"rollout/generated_tokens": 100, "rollout/seconds": 5.0, "rollout/generated_tokens_per_s": 20.0}
    >>> merge_groups([a, b])["rollout/generated_tokens_per_s"]  # 200 tokens / 5 s
    40.0
    """
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for group in groups for name in group):
        having = [group for group in groups if name in group]
        values = [group[name] for group in having]
        if name in SUMMED:
            merged[name] = sum(values)
        elif name in LARGEST:
            merged[name] = max(values)
        elif name.startswith("rollout/response_tokens_") or name in (
            "rollout/truncated_fraction",
            "rollout/turns_mean",
        ):
            merged[name] = float(np.average(values, weights=[group["rollout/sequences"] for group in having]))
        else:
            merged[name] = float(np.mean(values))
    if "rollout/generated_tokens_per_s" in merged:
        merged["rollout/generated_tokens_per_s"] = merged["rollout/generated_tokens"] / merged["rollout/seconds"]
    seconds = [group["rollout/seconds"] for group in groups if group.get("rollout/seconds")]
    if len(seconds) > 1:
        merged["rollout/imbalance"] = max(seconds) * len(seconds) / sum(seconds)
    return merged


def merge_rounds(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a phase that was made of several calls of `generate` over the same rows: amounts add up, the cache
    was as full as at its fullest, the rest is the first call's. What is said of whole responses is left to
    `turn_metrics`: a call saw parts of them.

    >>> first = {"rollout/generated_tokens": 100, "rollout/seconds": 1.0, "rollout/sequences": 8}
    >>> merged = merge_rounds([first, first | {"rollout/seconds": 3.0, "rollout/sequences": 5}])
    >>> merged["rollout/sequences"], merged["rollout/generated_tokens_per_s"]
    (8, 50.0)
    """
    of_responses = ("rollout/response_tokens_", "rollout/truncated_fraction")
    merged = {name: value for name, value in rounds[0].items() if not name.startswith(of_responses)}
    for name in ("rollout/generated_tokens", "rollout/seconds", "rollout/decode_steps", "rollout/preemptions"):
        if name in merged:
            merged[name] = sum(of_round[name] for of_round in rounds)
    if "rollout/kv_cache_usage" in merged:
        merged["rollout/kv_cache_usage"] = max(of_round["rollout/kv_cache_usage"] for of_round in rounds)
    if merged["rollout/seconds"] > 0:
        rate = merged["rollout/generated_tokens"] / merged["rollout/seconds"]
        merged["rollout/generated_tokens_per_s"] = rate
    return merged


def turn_metrics(figures: np.ndarray) -> dict[str, float]:
    """The rollout/* metrics of whole rollouts of several turns; none where no rollout has ended.

    Args:
        figures: (rows of the group, 4) int: tokens generated, tokens observed, turns, 1 if it finished else 0.

    >>> turn_metrics(np.array([[5, 3, 2, 1], [1, 0, 1, 0]]))["rollout/turns_mean"]
    1.5
    """
    if not len(figures):
        return {}
    generated, observed, turns, finished = figures.T
    return {
        "rollout/observation_tokens": int(observed.sum()),
        "rollout/turns_mean": float(turns.mean()),
        "rollout/response_tokens_mean": float(generated.mean()),
        "rollout/response_tokens_p50": float(np.percentile(generated, 50)),
        "rollout/response_tokens_p99": float(np.percentile(generated, 99)),
        "rollout/truncated_fraction": float(1.0 - finished.mean()),
    }


def _device_fractions(timeline: PhaseTimeline) -> dict[str, float]:
    """host_gap_fraction and tail_fraction, as `phase_metrics` defines them; empty where no step ran."""
    busy, steps = busy_spans(timeline)
    if not len(busy) or busy[-1, 1] <= busy[0, 0]:
        return {}
    decode_time = busy[-1, 1] - busy[0, 0]
    gaps = busy[1:, 0] - busy[:-1, 1]
    fractions = {"rollout/host_gap_fraction": float(gaps.sum() / decode_time)}
    live = timeline.live_sequences[steps]
    if live.max() > 0:
        tail_start = int(np.nonzero(live >= TAIL_SHARE * live.max())[0][-1]) + 1  # the first step of the tail
        tail = busy[-1, 1] - busy[tail_start, 0] if tail_start < len(busy) else 0.0
        fractions["rollout/tail_fraction"] = float(tail / decode_time)
    return fractions


def _recorded(spans: np.ndarray) -> np.ndarray:
    """True where a span was recorded: spans (..., 2) to (...,) bool."""
    return ~np.isnan(spans[..., 0])


def _grown(rows: np.ndarray, step: int, unknown: float) -> np.ndarray:
    """A copy with twice the rows, or more if `step` needs it; the new ones unknown."""
    capacity = len(rows)
    while capacity <= step:
        capacity *= 2
    return _rows(rows, capacity, unknown)


def _rows(rows: np.ndarray, num_rows: int, unknown: float) -> np.ndarray:
    """A copy of the first num_rows rows, filled up with unknown ones where there are fewer."""
    copy = np.full((num_rows, rows.shape[1]), unknown, rows.dtype)
    copy[: len(rows)] = rows[:num_rows]
    return copy
