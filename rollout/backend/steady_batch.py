"""The running batch as arrays, while every sequence of it decodes one token a step.

vLLM keeps a batch as a list of Request objects and walks it twice a step. Here a step is a few operations on arrays;
the Request objects stay behind, and are brought up to date (settled) when vLLM's own code is about to see them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from vllm.v1.request import Request, RequestStatus

# Unsettled tokens a row, at most: beyond it all rows settle, once in so many steps.
BUFFER_TOKENS = 256
NEVER = np.iinfo(np.int64).max
NO_TOKEN = -1
# The rows of SteadyBatch's table of counts, in the order in which `_bind` names them.
NUM_COUNTS = 10


@dataclass(frozen=True)
class Plan:
    """The rows that one step takes.

    Attributes:
        rows: indices into the batch; a slice where all rows are taken.
        request_ids: their ids. Never changed in place: the same object means the same rows.
        num_scheduled_tokens: {request id: 1}, vLLM's form of the same.
    """

    rows: slice | np.ndarray
    request_ids: list[str]
    num_scheduled_tokens: dict[str, int]

    @classmethod
    def of(cls, rows: slice | np.ndarray, request_ids: list[str]) -> "Plan":
        """One token for each of these requests; `rows` (requests,) int64, or a slice."""
        return cls(rows, request_ids, dict.fromkeys(request_ids, 1))


@dataclass(frozen=True)
class Due:
    """The rows of a step that vLLM's allocator has to see: they need a block, or have one to register.

    Attributes:
        indices: of the rows in the step.
        rows: in the batch.
        requests: theirs, up to date.
    """

    indices: list[int]
    rows: list[int]
    requests: list[Request]


class SteadyBatch:
    """Arrays over the running requests, a row a sequence, in the scheduler's order.

    With n tokens known, prompt included, and s steps scheduled whose tokens are not known yet, a decoding request has
    n + s - 1 tokens computed or about to be, and its next step computes the one at position n + s - 1. So n and s are
    counted, and all else that changes in a step follows.

    Args:
        requests: the scheduler's own list `running`, each of them one for which `can_join` holds.
        manager: vLLM's FullAttentionManager.
        asynchronous: True if steps are scheduled before the tokens of the last one are known (AsyncScheduler).
        staggered: True if a step writes down which step a request may decode in next (asynchronous, V2 model runner).
        max_model_len: prompt plus response of one sequence, in tokens.

    Attributes:
        requests: of the rows. Another list than the scheduler's `running` means that the batch is out of date.
        request_ids: of the rows.
        row_of: request id to row; a new object whenever rows leave.
        num_tokens: (rows,) int64, tokens known.
        in_flight: (rows,) int64, steps scheduled whose tokens are not known yet.
        next_block: (rows,) int64, the position at which a new block is needed.
        next_full: (rows,) int64, the number of tokens at which the next block is full, to be registered in the prefix
            cache; NEVER without a prefix cache.
        wants_logprobs: (rows,) bool; True where the request asked for log-probs.
    """

    def __init__(
        self, requests: list[Request], manager: Any, asynchronous: bool, staggered: bool, max_model_len: int
    ) -> None:
        self.requests = requests
        self._manager = manager
        self._asynchronous = asynchronous
        self._staggered = staggered
        self._max_model_len = max_model_len
        self._unsettled = np.empty(len(requests) * BUFFER_TOKENS, np.int32)
        self._num_appended = 0
        self._dirty = False
        self._index()
        counts = [self._counts_of(row, request) for row, request in enumerate(requests)]
        self._bind(np.array(counts, np.int64).T.copy())
        self._stop_ids = stop_ids_of(requests)
        self.wants_logprobs = np.array([request.sampling_params.num_logprobs is not None for request in requests])

    def __len__(self) -> int:
        return len(self.request_ids)

    def plan(self) -> Plan:
        """What the next step takes: all rows but those whose last token is already on its way."""
        if not self._asynchronous:
            return self._all
        # vLLM's two reasons; they differ where more than one step is in flight.
        last = (self.in_flight > 0) & (self.num_tokens + 1 >= self._max_len)
        last |= self.num_tokens + self.in_flight >= self._max_model_len
        if not last.any():
            return self._all
        rows = np.flatnonzero(~last)
        return Plan.of(rows, [self.request_ids[row] for row in rows.tolist()])

    def num_output_tokens(self, rows: slice | np.ndarray) -> list[int]:
        """Response tokens of `rows`, (k,) int64 or a slice; under asynchronous scheduling with those in flight."""
        known = self.num_tokens[rows] - self._num_prompt_tokens[rows]
        return (known + self.in_flight[rows] if self._asynchronous else known).tolist()

    def advance(self, plan: Plan, step: int) -> None:
        """Count one more step in flight for the plan's rows; `step` is the scheduler's number of it."""
        self._dirty = True
        self.in_flight[plan.rows] += 1
        if self._staggered:
            self._eligible_step[plan.rows] = step + 1

    def append(self, rows: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        """Take in one token a row: (k,) bool, True where the sequence ends with it.

        Args:
            rows: (k,) int64, all different.
            token_ids: (k,) int32.
        """
        if self._num_appended == BUFFER_TOKENS:
            self.settle()
            self._num_appended = 0
        self._num_appended += 1
        self._dirty = True
        self._unsettled[self._buffer_end[rows]] = token_ids
        self._buffer_end[rows] += 1
        self.in_flight[rows] -= 1
        num_tokens = self.num_tokens[rows] + 1
        self.num_tokens[rows] = num_tokens
        ended = num_tokens >= np.minimum(self._max_len[rows], self._max_model_len)
        ended |= (self._stop_ids[rows] == token_ids[:, None]).any(axis=1)
        return ended

    def settle(self) -> None:
        """Bring all Requests up to date."""
        if not self._dirty:
            return
        for request, counts in zip(self.requests, self._table.T.tolist(), strict=True):
            self._write(request, counts)
        self._buffer_end[:] = self._buffer_start
        self._dirty = False

    def settle_row(self, row: int) -> Request:
        """Bring one Request up to date and return it."""
        request = self.requests[row]
        self._write(request, self._table[:, row].tolist())
        self._buffer_end[row] = self._buffer_start[row]
        return request

    def settle_rows(self, plan: Plan, due: np.ndarray) -> Due:
        """Bring the Requests of some of the plan's rows up to date; `due` (rows of the plan,) bool, True for those."""
        indices = np.flatnonzero(due)
        rows = (indices if isinstance(plan.rows, slice) else plan.rows[indices]).tolist()
        return Due(indices.tolist(), rows, [self.settle_row(row) for row in rows])

    def read_blocks(self, row: int) -> None:
        """Take a row's blocks over from the allocator, after it was at work on them."""
        self.next_block[row], self.next_full[row] = self._blocks_of(self.request_ids[row])

    def drop(self, rows: Sequence[int]) -> None:
        """Take rows out; the others move up in their order. `requests` becomes a new list."""
        keep = np.ones(len(self), bool)
        keep[rows] = False
        self._bind(self._table[:, keep])
        self._stop_ids = self._stop_ids[keep]
        self.wants_logprobs = self.wants_logprobs[keep]
        self.requests = list(compress(self.requests, keep.tolist()))
        self._index()

    def _index(self) -> None:
        self.request_ids = [request.request_id for request in self.requests]
        self.row_of = {request_id: row for row, request_id in enumerate(self.request_ids)}
        self._all = Plan.of(slice(None), self.request_ids)

    def _counts_of(self, row: int, request: Request) -> tuple[int, ...]:
        in_flight = request.num_output_placeholders
        start = row * BUFFER_TOKENS
        return (
            request.num_tokens,
            in_flight,
            *self._blocks_of(request.request_id),
            request.num_prompt_tokens,
            request.num_prompt_tokens + request.max_tokens,
            # The chunk of the prompt whose output is still to come, less the token that it makes.
            request.num_in_flight_tokens - in_flight,
            request.next_decode_eligible_step,
            start,
            start,
        )

    def _bind(self, table: np.ndarray) -> None:
        self._table = table
        self.num_tokens, self.in_flight, self.next_block, self.next_full = table[:4]
        self._num_prompt_tokens, self._max_len, _, self._eligible_step = table[4:8]
        # The row's part of the buffer of unsettled tokens; its place there stays when rows before it leave.
        self._buffer_start, self._buffer_end = table[8:NUM_COUNTS]

    def _write(self, request: Request, counts: list[int]) -> None:
        num_tokens, in_flight, _, _, _, _, prompt_in_flight, eligible_step, start, end = counts
        if end > start:
            request.append_output_token_ids(self._unsettled[start:end].tolist())
        request.num_computed_tokens = num_tokens + in_flight - 1
        request.num_in_flight_tokens = in_flight + prompt_in_flight
        if self._asynchronous:
            request.num_output_placeholders = in_flight
        if self._staggered:
            request.next_decode_eligible_step = eligible_step

    def _blocks_of(self, request_id: str) -> tuple[int, int]:
        manager = self._manager
        next_block = len(manager.req_to_blocks[request_id]) * manager.block_size
        if not manager.enable_caching:
            return next_block, NEVER
        return next_block, (manager.num_cached_block.get(request_id, 0) + 1) * manager.block_size


def can_join(request: Request) -> bool:
    """True if the request's next step is one decode step, and nothing but tokens and lengths decides when it ends.

    `min_tokens` is no obstacle: vLLM enforces it in the logits, and its scheduler does not look at it before a stop
    token or a length limit.
    """
    params = request.sampling_params
    return (
        request.status == RequestStatus.RUNNING
        and not request.is_prefill_chunk
        and request.num_computed_tokens == request.num_tokens + request.num_output_placeholders - 1
        and not request.num_stale_output_tokens
        and not request.spec_token_ids
        and not request.mm_features
        and not request.resumable
        and request.structured_output_request is None
        and request.pooling_params is None
        and params is not None
        and params.repetition_detection is None
    )


def stop_ids_of(requests: Sequence[Request]) -> np.ndarray:
    """(rows, widest) int64, the token ids that end each sequence; NO_TOKEN where a row has fewer."""
    lists = []
    for request in requests:
        params = request.sampling_params
        eos = NO_TOKEN if params.eos_token_id is None else params.eos_token_id
        lists.append([eos, *(params.stop_token_ids or ())])
    widest = max(map(len, lists))
    return np.array([ids + [NO_TOKEN] * (widest - len(ids)) for ids in lists], np.int64)
