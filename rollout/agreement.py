"""Proof that the ranks of a tensor-parallel group still do the same: every step's digests, compared off the hot path.

Every rank runs the same scheduler over the same requests and takes in the same tokens. If that ever ends (a random
number that one rank drew, memory that went bad, a bug) the ranks generate different texts, or wait in a collective for
ever. So each rank writes two digests a step, of what it scheduled and of what it sampled, onto a board in shared memory
that the others read. Nobody waits for anybody: whoever comes later to a step compares. What a step costs is two
checksums of a few kilobytes; the comparison itself comes every few steps, and at the end of each phase.
"""

import mmap
import os
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch.distributed as dist

from rollout.world import gathered

SLOTS = 4096
"""Steps that the board remembers; a rank that is further ahead is compared at the end of the phase."""
RECORDS = 64
"""Steps that each rank can still tell in full."""
FINISH_TIMEOUT_S = 600.0  # as long as the job's own collectives wait
FINISH_POLL_S = 0.0005
STEP_BITS, DIGEST_BITS = 24, 40
SCHEDULED, SAMPLED = 0, 1
EXPLANATION_TIMEOUT_S = 10.0
"""How long a rank that has found a difference waits for the others, which may hang in a collective for it."""


class RanksDisagree(RuntimeError):
    """The ranks of a tensor-parallel group scheduled or sampled different things. The same message on every rank."""


class Update(Protocol):
    """What one step brought: `rollout.backend.step_update.StepUpdate`."""

    request_ids: list[str]
    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass
class Record:
    """One step, as one rank saw it.

    Attributes:
        counts: scheduled tokens by request.
        positions: (requests,) int64, of the first of them, in the same order.
        request_ids: the requests that got a token; None until then.
        token_ids: (k,) int32, theirs.
        logprobs: (k,) float32, theirs.
    """

    step: int
    counts: Mapping[str, int]
    positions: np.ndarray
    request_ids: list[str] | None = None
    token_ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None


class Agreement:
    """The group's board, and this rank's part in it.

    Made, and `finish`ed, by all ranks of the group together; everything else is each rank's own and never waits.

    Args:
        group: a gloo group of ranks on one machine.
        last_words: another of the same ranks, whose collectives give up after EXPLANATION_TIMEOUT_S.
        every: steps between two comparisons.
    """

    def __init__(self, group: dist.ProcessGroup, last_words: dist.ProcessGroup, every: int = 16) -> None:
        self._group, self._last_words = group, last_words
        self._rank = dist.get_rank(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._every = every
        self._board = shared_board(group, dist.get_world_size(group))
        self._step = 0  # of the engine's whole life: scheduled so far
        self._first_step_of_phase = 0
        self._checked = 0  # steps before it were compared
        self._rolling = 0
        self._records: deque[Record] = deque(maxlen=RECORDS)
        self._waiting: deque[Record] = deque()  # scheduled, and not sampled yet
        self._order: Sequence[str] | None = None
        self._order_digest = 0

    def scheduled(self, counts: Mapping[str, int], positions: np.ndarray, order: Sequence[str] | None = None) -> None:
        """Note the next step's schedule.

        Args:
            counts: tokens by request, in the scheduler's order.
            positions: (requests,) int64, in its sequence, of the first of each request's tokens.
            order: the requests, if each has one token; a list that is never changed in place.
        """
        if order is None:
            digest = zlib.crc32(repr(list(counts.items())).encode())
        else:
            if order is not self._order:
                self._order, self._order_digest = order, zlib.crc32(repr(list(order)).encode())
            digest = self._order_digest
        record = Record(self._step, counts, positions)
        self._records.append(record)
        self._waiting.append(record)
        self._write(self._step, SCHEDULED, zlib.crc32(positions.tobytes(), digest))
        self._step += 1

    def sampled(self, update: Update) -> None:
        """Note the tokens of the oldest step whose tokens are still to come; now and then, compare.

        Raises:
            RanksDisagree: if this rank or another has found a difference.
        """
        record = self._waiting.popleft()
        record.request_ids, record.token_ids, record.logprobs = update.request_ids, update.token_ids, update.logprobs
        digest = zlib.crc32(update.logprobs.tobytes(), zlib.crc32(update.token_ids.tobytes()))
        self._write(record.step, SAMPLED, digest)
        self.check()
        if record.step + 1 - self._checked >= self._every:
            self._compare(self._checked, record.step + 1)
            self._checked = record.step + 1

    def check(self) -> None:
        """See whether another rank has found a difference.

        Raises:
            RanksDisagree: if so.
        """
        if self._board.stop[0]:
            self._explain()

    def look(self) -> None:
        """For whoever waits long for a step, which may hang for a difference: see whether there is one.

        Raises:
            RanksDisagree: if so.
        """
        self.check()
        self._compare(self._checked, self._step)

    def finish(self) -> None:
        """End a phase; all ranks, which wait for each other here.

        Raises:
            RanksDisagree: if anything in the phase differed.
            TimeoutError: if a rank does not come.
        """
        done, deadline = self._board.done, time.monotonic() + FINISH_TIMEOUT_S
        done[self._rank, 1] = self._rolling
        done[self._rank, 0] = self._step + 1  # behind the digest that it announces
        while True:
            # Again and again: the others' last steps come while this one waits.
            self._compare(self._first_step_of_phase, self._step)
            self.check()
            if (done[:, 0] > self._step).all():
                break
            if time.monotonic() > deadline:
                late = [self._ranks[index] for index in np.flatnonzero(done[:, 0] <= self._step)]
                raise TimeoutError(f"rank {late[0]} did not end the phase within {FINISH_TIMEOUT_S:g} s")
            time.sleep(FINISH_POLL_S)
        here = done[:, 0] == self._step + 1  # a rank may be a phase ahead by now
        if (done[here, 1] != self._rolling).any():
            self._explain()
        self._first_step_of_phase = self._checked = self._step

    def _write(self, step: int, kind: int, digest: int) -> None:
        self._rolling = zlib.crc32(digest.to_bytes(4, "little"), self._rolling)
        # One word, so that no reader sees the number of one step with the digest of another.
        self._board.words[self._rank, step % SLOTS, kind] = (step + 1) % 2**STEP_BITS << DIGEST_BITS | digest

    def _compare(self, start: int, end: int) -> None:
        steps = np.arange(max(start, end - SLOTS), end)
        words = self._board.words[:, steps % SLOTS]
        ours = words[self._rank]
        same_step = words >> DIGEST_BITS == ours >> DIGEST_BITS  # the others may be behind, or far ahead
        if (same_step & (words != ours)).any():
            self._explain()

    def _explain(self) -> None:
        """Stop the others at their next step, and tell all ranks the same."""
        self._board.stop[0] = 1
        try:
            everyones = gathered(list(self._records), self._last_words)
        except RuntimeError as error:
            raise RanksDisagree(
                f"rank {self._ranks[self._rank]} found that the ranks of its tensor-parallel group no longer do the "
                f"same, at the latest since step {self._checked - self._first_step_of_phase} of the phase; another "
                f"rank did not come to say how: {error}"
            ) from error
        raise RanksDisagree(describe(dict(zip(self._ranks, everyones, strict=True)), self._first_step_of_phase))


@dataclass(frozen=True)
class Board:
    """Shared memory of a group.

    Attributes:
        words: (ranks, SLOTS, 2) uint64: step + 1 and digest of a step's schedule and of its tokens.
        done: (ranks, 2) uint64: steps + 1 at the end of a rank's last phase, and the digest of all of them.
        stop: (1,) uint64; not 0 once a rank has found a difference.
    """

    words: np.ndarray
    done: np.ndarray
    stop: np.ndarray


def shared_board(group: dist.ProcessGroup, ranks: int) -> Board:
    """A board for the group, filled with zeros; its file has no name any more when this returns."""
    num_words = ranks * SLOTS * 2 + ranks * 2 + 1
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    path: list[str | None] = [None]
    if dist.get_rank(group) == 0:
        descriptor, path[0] = tempfile.mkstemp(prefix="rollout-agreement-", dir=folder)
        os.ftruncate(descriptor, 8 * num_words)
    dist.broadcast_object_list(path, group=group, group_src=0)
    assert path[0] is not None
    if dist.get_rank(group) != 0:
        descriptor = os.open(path[0], os.O_RDWR)
    memory = mmap.mmap(descriptor, 8 * num_words)
    os.close(descriptor)
    dist.barrier(group)
    if dist.get_rank(group) == 0:
        os.unlink(path[0])
    words = np.frombuffer(memory, np.uint64)
    stop, done, steps = words[:1], words[1 : 1 + 2 * ranks], words[1 + 2 * ranks :]
    return Board(steps.reshape(ranks, SLOTS, 2), done.reshape(ranks, 2), stop)


def describe(records: Mapping[int, Sequence[Record]], first_step_of_phase: int) -> str:
    """What differs first between the records of the ranks, as a sentence.

    >>> schedule = {"counts": {"7": 1}, "positions": np.array([40]), "request_ids": ["7"]}
    >>> ours, theirs = (Record(3, **schedule, token_ids=np.array([t]), logprobs=np.array([-0.5])) for t in (11, 12))
    >>> describe({0: [ours], 1: [theirs]}, first_step_of_phase=0)
    'the ranks of the tensor-parallel group no longer do the same: step 3 of the phase, request 7: \
token 11 with log-prob -0.5 on rank 0, token 12 with log-prob -0.5 on rank 1. ...'
    """
    known = [{record.step: record for record in of_rank} for of_rank in records.values()]
    found = "where, is no longer known"
    for step in sorted(set.intersection(*map(set, known))):
        difference = _difference(list(records), [of_rank[step] for of_rank in known])
        if difference:
            found = f"step {step - first_step_of_phase} of the phase, {difference}"
            break
    return (
        f"the ranks of the tensor-parallel group no longer do the same: {found}. Their weights, random streams or "
        "schedules have drifted apart, and nothing they generated since can be trusted: start again from the last "
        "checkpoint"
    )


def _difference(ranks: Sequence[int], records: Sequence[Record]) -> str | None:
    """What differs between the ranks' views of one step; None if nothing does."""
    requests = dict.fromkeys(request_id for record in records for request_id in record.counts)
    for request_id in requests:
        counts = [record.counts.get(request_id, 0) for record in records]
        if len(set(counts)) > 1:
            return f"request {request_id}: {_by_rank(ranks, [f'{count} tokens scheduled' for count in counts])}"
    if len({tuple(record.counts) for record in records}) > 1:
        return f"all requests: {_by_rank(ranks, ['in the order ' + _some(record.counts) for record in records])}"
    for index, request_id in enumerate(requests):
        positions = [int(record.positions[index]) for record in records]
        if len(set(positions)) > 1:
            return f"request {request_id}: {_by_rank(ranks, [f'a token at position {each}' for each in positions])}"
    if any(record.request_ids is None for record in records):
        return None
    outcomes = [_outcomes(record) for record in records]
    for request_id in requests:
        theirs = [of_rank.get(request_id, "no token") for of_rank in outcomes]
        if len(set(theirs)) > 1:
            return f"request {request_id}: {_by_rank(ranks, theirs)}"
    return None


def _outcomes(record: Record) -> dict[str, str]:
    assert record.request_ids is not None and record.token_ids is not None and record.logprobs is not None
    arrays = zip(record.request_ids, record.token_ids.tolist(), record.logprobs.tolist(), strict=True)
    return {request_id: f"token {token} with log-prob {logprob!r}" for request_id, token, logprob in arrays}


def _by_rank(ranks: Sequence[int], values: Sequence[str]) -> str:
    return ", ".join(f"{value} on rank {rank}" for rank, value in zip(ranks, values, strict=True))


def _some(names: Mapping[str, int]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "")
