"""vLLM's scheduler, with a fast path for the steps in which every running sequence decodes one token.

vLLM's own takes 9 us a sequence to schedule a step and as long to take its output, whatever the step. In a rollout
nearly all steps are alike: each sequence gets one token, and now and then one needs a block or ends. Such a step is
done here on arrays (`SteadyBatch`); a request is touched when it needs a block, when a block of it becomes full, or
when it ends, and then by vLLM's own code, in vLLM's order. What the workers and the block allocator see is the same,
bit for bit. Every other step goes through vLLM's code, after the Request objects have been brought up to date.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinatorNoPrefixCache, UnitaryKVCacheCoordinator
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from rollout.backend.admission import first_in_line, fits_anyway, looks_at_waiting, stays_out
from rollout.backend.outputs import sampled_tokens
from rollout.backend.steady_batch import Due, Plan, SteadyBatch, can_join
from rollout.backend.step_update import StepUpdate, brings_tokens_only, logprobs_of, to_update


@dataclass
class SteadyOutput(SchedulerOutput):
    """A step that was scheduled on the fast path.

    Attributes:
        order: ids of the scheduled requests. Never changed in place, so that the same object means the same requests.
        positions: (requests,) int64, of their tokens, each in its sequence.
    """

    order: list[str] = field(default_factory=list)
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Match:
    """Where the sequences of a step stand, in the batch and in the model runner's output.

    Attributes:
        order: of the step, `SteadyOutput.order`.
        row_of: of the batch.
        runner_ids: of the runner's output.
        request_ids: of the sequences that still live, in the step's order.
        rows: (k,) int64, theirs in the batch.
        columns: (k,) int64, theirs in the runner's output.
    """

    order: list[str]
    row_of: dict[str, int]
    runner_ids: list[str]
    request_ids: list[str]
    rows: np.ndarray
    columns: np.ndarray


class SteadyScheduler(Scheduler):
    """vLLM's Scheduler for one step at a time, with the fast path; `take_output` stands for `update_from_output`.

    A step is steady if all running requests are decoding, no waiting request would be admitted, and the engine has none
    of: speculative decoding, LoRA, encoder inputs, structured output, KV or encoder connectors, pipeline or
    decode context parallelism, KV events, statistics, more than one KV-cache group, or attention other than full.

    Attributes:
        num_steady_schedules: steps scheduled on the fast path so far.
        num_steady_updates: outputs taken on the fast path so far.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_steady_schedules = 0
        self.num_steady_updates = 0
        self._asynchronous = isinstance(self, AsyncScheduler)
        self._can_be_steady = _can_be_steady(self)
        self._batch: SteadyBatch | None = None
        self._match: Match | None = None
        self._last_order: list[str] | None = None

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next step: from the arrays where all that runs decodes, else vLLM's."""
        if not throttle_prefills and self._is_steady():
            output = self._schedule_steady()
            if output is not None:
                self.num_steady_schedules += 1
                return output
        self._leave_batch()
        return super().schedule(throttle_prefills)

    def take_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> StepUpdate:
        """Take in a step's tokens and end the sequences that are complete; call it once a step, in their order.

        Args:
            scheduler_output: from `schedule`.
            model_runner_output: of this step; its tokens as `SampledTokens` or as vLLM's list of lists.
        """
        update = self._take_steady(scheduler_output, model_runner_output)
        if update is not None:
            self.num_steady_updates += 1
            return update
        return to_update(self.update_from_output(scheduler_output, model_runner_output).values())

    def positions(self, scheduler_output: SchedulerOutput) -> np.ndarray:
        """(requests,) int64: where in its sequence the first token of each scheduled request stands."""
        if isinstance(scheduler_output, SteadyOutput):
            return scheduler_output.positions
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {request.req_id: request.num_computed_tokens for request in scheduler_output.scheduled_new_reqs}
        return np.array([computed[each] for each in scheduler_output.num_scheduled_tokens], np.int64)

    def settle(self) -> None:
        """Bring the Request objects up to date, for whoever wants to look at them between two steps."""
        if self._batch is not None:
            self._batch.settle()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, on objects that are up to date."""
        self._leave_batch()
        return super().update_from_output(scheduler_output, model_runner_output)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """vLLM's, on objects that are up to date."""
        self._leave_batch()
        return super().finish_requests(request_ids, finished_status)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """vLLM's, on objects that are up to date."""
        self._leave_batch()
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _leave_batch(self) -> None:
        self.settle()
        self._batch = None

    def _is_steady(self) -> bool:
        """True if the next step is steady; makes the batch of it."""
        if not self._can_be_steady or self._pause_state != PauseState.UNPAUSED:
            return False
        if self._inflight_prefills:  # no walk over the requests while long prompts are under way
            return False
        first = None
        # With every place taken vLLM does not look at the waiting requests.
        if looks_at_waiting(self) and (first := first_in_line(self)) is None:
            return False
        if self._batch is not None and self._batch.requests is self.running and len(self._batch) == len(self.running):
            return True
        self._leave_batch()
        if first is not None and fits_anyway(self.kv_cache_manager, first, len(self.running)):
            return False  # before a batch is made in vain
        if not self.running or not all(map(can_join, self.running)):
            return False
        self._batch = SteadyBatch(
            self.running,
            self.kv_cache_manager.coordinator.single_type_managers[0],
            self._asynchronous,
            self._asynchronous and self.use_v2_model_runner,
            self.max_model_len,
        )
        return True

    def _schedule_steady(self) -> SteadyOutput | None:
        """One decode step for the batch; None, with nothing changed, if vLLM would do more than that."""
        batch = self._batch
        assert batch is not None
        plan = batch.plan()
        num_rows = len(plan.request_ids)
        num_tokens, in_flight = batch.num_tokens[plan.rows], batch.in_flight[plan.rows]
        if num_rows > min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens):
            return None
        if not self._asynchronous and in_flight.any():
            return None  # vLLM schedules nothing until the tokens are there
        # vLLM's V1 runner is sent the tokens of a request that it did not see in the last step.
        new_order = not self.use_v2_model_runner and plan.request_ids is not self._last_order
        if new_order and not self.prev_step_scheduled_req_ids.issuperset(plan.request_ids):
            return None
        num_computed_tokens = num_tokens + in_flight - 1
        needs_block = num_computed_tokens >= batch.next_block[plan.rows]
        num_free_blocks = self.kv_cache_manager.block_pool.get_num_free_blocks() - np.count_nonzero(needs_block)
        if num_free_blocks < 0:
            return None  # vLLM preempts
        due = batch.settle_rows(plan, needs_block | (num_tokens >= batch.next_full[plan.rows]))
        if looks_at_waiting(self):
            first = first_in_line(self)
            if first is None or not stays_out(self.kv_cache_manager, first, num_free_blocks, due.requests):
                return None  # vLLM admits it

        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        new_block_ids = self._allocate(batch, due, needs_block)
        output = self._steady_output(plan, num_computed_tokens, new_block_ids)
        if new_order:
            self.prev_step_scheduled_req_ids.clear()
            self.prev_step_scheduled_req_ids.update(plan.request_ids)
            self._last_order = plan.request_ids
        self.prefill_capacity_bound = self.get_request_counts()[1] > len(self.deferred_waiting)
        self.finished_req_ids: set[str] = set()
        self.reset_preempted_req_ids: set[str] = set()
        batch.advance(plan, self.current_step)
        return output

    def _allocate(self, batch: SteadyBatch, due: Due, needs_block: np.ndarray) -> list[tuple[list[int], ...] | None]:
        """Let vLLM allocate and register blocks for the rows that are due; every row's new block ids, or None."""
        new_block_ids: list[tuple[list[int], ...] | None] = [None] * len(needs_block)
        for index, row, request in zip(due.indices, due.rows, due.requests, strict=True):
            if needs_block[index]:
                blocks = self.kv_cache_manager.allocate_slots(request, 1)
                assert blocks is not None, "the free blocks were counted before"
                new_block_ids[index] = blocks.get_block_ids(allow_none=True)
            else:
                self.kv_cache_manager.cache_blocks(request, request.num_tokens)
            batch.read_blocks(row)
        return new_block_ids

    def _steady_output(
        self, plan: Plan, num_computed_tokens: np.ndarray, new_block_ids: list[tuple[list[int], ...] | None]
    ) -> SteadyOutput:
        assert self._batch is not None
        return SteadyOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=plan.request_ids.copy(),
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=new_block_ids,
                num_computed_tokens=num_computed_tokens.tolist(),
                num_output_tokens=self._batch.num_output_tokens(plan.rows),
            ),
            num_scheduled_tokens=plan.num_scheduled_tokens.copy(),
            total_num_scheduled_tokens=len(plan.request_ids),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
            ec_manager_metadata=self.encoder_cache_manager.get_manager_metadata(),
            order=plan.request_ids,
            positions=num_computed_tokens,
        )

    def _take_steady(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> StepUpdate | None:
        """`take_output` on the fast path; None, with nothing changed, if vLLM has to look at it."""
        batch = self._batch
        if (
            batch is None
            or not isinstance(scheduler_output, SteadyOutput)
            or not brings_tokens_only(model_runner_output)
        ):
            return None
        if self.grammar_compile_error_reqs or self.encoder_cache_mismatch_reqs:
            return None
        match = self._find(batch, scheduler_output.order, model_runner_output)
        if match is None:
            return None
        tokens = sampled_tokens(model_runner_output.sampled_token_ids)
        if tokens.valid is not None and not tokens.valid[match.columns].all():
            return None

        token_ids = tokens.token_ids[match.columns].astype(np.int32)
        logprobs = logprobs_of(model_runner_output.logprobs, match.columns)
        logprobs[~batch.wants_logprobs[match.rows]] = np.nan
        ended = batch.append(match.rows, token_ids)
        finished = self._end(batch, match, ended)
        return StepUpdate(match.request_ids, token_ids, logprobs, finished)

    def _end(self, batch: SteadyBatch, match: Match, ended: np.ndarray) -> list[tuple[int, int]]:
        """Let vLLM end the sequences that are complete, and register the blocks that became full."""
        touched = ended
        if self._asynchronous:  # computed tokens: all but the last
            touched = ended | (batch.num_tokens[match.rows] - 1 >= batch.next_full[match.rows])
        finished: list[tuple[int, int]] = []
        for index in np.flatnonzero(touched).tolist():
            row = int(match.rows[index])
            request = batch.settle_row(row)
            # Before the stop, as in vLLM: blocks that are freed with a hash stay in the prefix cache.
            if self._asynchronous:
                self.kv_cache_manager.cache_blocks(request, request.num_tokens - 1)
            if not ended[index]:
                batch.read_blocks(row)
                continue
            stopped = check_stop(request, self.max_model_len)
            assert stopped
            self._free_request(request)
            finished.append((index, int(request.get_finished_reason())))
        if finished:
            batch.drop([int(match.rows[index]) for index, _ in finished])
            self.running = batch.requests
            if not batch.requests:
                self._batch = None
        return finished

    def _find(self, batch: SteadyBatch, order: list[str], output: ModelRunnerOutput) -> Match | None:
        """Where the step's sequences stand; None if one of them lives outside the batch (it was preempted, say)."""
        last = self._match
        if (
            last is not None
            and last.order is order
            and last.row_of is batch.row_of
            and last.runner_ids == output.req_ids
        ):
            return last
        living = [request_id for request_id in order if request_id in batch.row_of]
        # The others were scheduled once more before their end was known; their tokens are discarded.
        if len(living) < len(order) and any(each in self.requests and each not in batch.row_of for each in order):
            return None
        if last is not None and last.request_ids == living:
            living = last.request_ids
        rows = np.fromiter(map(batch.row_of.__getitem__, living), np.int64, len(living))
        columns = np.fromiter(map(output.req_id_to_index.__getitem__, living), np.int64, len(living))
        self._match = Match(order, batch.row_of, list(output.req_ids), living, rows, columns)
        return self._match


class SteadyAsyncScheduler(SteadyScheduler, AsyncScheduler):
    """vLLM's AsyncScheduler with the fast path: step i+1 is scheduled before the output of step i is taken.

    A sequence that ends in step i has been scheduled once too often by then; that token is discarded.
    """


def _can_be_steady(scheduler: Scheduler) -> bool:
    """True if the engine's configuration has nothing that the fast path leaves out."""
    [manager, *others] = scheduler.kv_cache_manager.coordinator.single_type_managers or (None,)
    return (
        not others
        and type(manager) is FullAttentionManager
        and type(scheduler.kv_cache_manager.coordinator) in (UnitaryKVCacheCoordinator, KVCacheCoordinatorNoPrefixCache)
        and scheduler.dcp_world_size == 1
        and not scheduler.use_pp
        and getattr(scheduler, "decode_stagger", 1) == 1
        and scheduler.vllm_config.speculative_config is None
        and scheduler.num_spec_tokens == scheduler.num_lookahead_tokens == 0
        and scheduler.num_sampled_tokens_per_step == 1
        and scheduler.lora_config is None
        and not scheduler.is_encoder_decoder
        and not scheduler.is_mm_encoder_only
        and scheduler.connector is None
        and scheduler.ec_connector is None
        and scheduler.aux_output_connector is None
        and scheduler.kv_metrics_collector is None
        and not scheduler.enable_kv_cache_events
        and not scheduler.return_sampling_mask
        and scheduler.finished_req_ids_dict is None
        and not scheduler.log_stats
    )
