"""The main threads of many ranks in one process: real schedulers on virtual devices, without workers or weights.

It measures what scheduling costs a rank when a job has many replicas. Each rank is vLLM's scheduler as the engine
builds it, its digests (rollout/agreement.py) and its arrays of tokens, driven in the order of `rollout.driver.drive`;
a rank's device is the simulated accelerator's, coupled with those of its tensor-parallel group. Left out is what the
execute thread does: preparing inputs and launching, which no other rank has a part in.
"""

from collections import deque
from collections.abc import Sequence
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from rollout.agreement import Agreement
from rollout.backend.groups import GroupAdmission
from rollout.backend.outputs import SampledTokens
from rollout.backend.scheduler import SteadyAsyncScheduler
from rollout.backend.virtual_device import BOARD_STEPS, DeviceStep, LaunchBoard, VirtualDevice
from rollout.driver import Collected

BLOCK_TOKENS = 128


def host_config(model: str, max_model_len: int, max_num_seqs: int, step_tokens: int) -> VllmConfig:
    """vLLM's configuration of the ranks, all of which may share it.

    Args:
        model: a local folder; nothing but its config is read.
        step_tokens: that one step may process.
    """
    return EngineArgs(
        model=model,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        block_size=BLOCK_TOKENS,
        enable_prefix_caching=False,
        async_scheduling=False,  # asked of the CPU platform, which refuses it; the scheduler's class says it here
        skip_tokenizer_init=True,
        enforce_eager=True,
    ).create_engine_config()


def tensor_parallel_boards(ranks: int) -> list[LaunchBoard]:
    """The launch boards of one tensor-parallel group whose ranks are in this process."""
    times = np.zeros((ranks, BOARD_STEPS))
    return [LaunchBoard(rank, times) for rank in range(ranks)]


class HostRank:
    """One rank's main thread, and its device.

    Args:
        config: of `host_config`.
        board: of its tensor-parallel group.
        step_s: seconds that the device takes for a step.
        group: of one process: the digests are made, and compared with nobody's.

    Attributes:
        schedule_s: processor seconds of this thread for each step of the last phase, schedule and digest.
        update_s: the same, to take its tokens in.
        scheduled_tokens: of each of its steps.
    """

    def __init__(self, config: VllmConfig, board: LaunchBoard, step_s: float, group: dist.ProcessGroup) -> None:
        num_blocks = config.scheduler_config.max_num_seqs * -(-config.model_config.max_model_len // BLOCK_TOKENS) + 1
        attention = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config.scheduler_config.async_scheduling = True
        config.cache_config.num_gpu_blocks = num_blocks
        self._scheduler = SteadyAsyncScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], attention)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            log_stats=False,
        )
        self._groups = GroupAdmission(self._scheduler)
        self._device = VirtualDevice(step_s, board)
        self._agreement = Agreement(group, group)
        self._lengths: dict[str, int] = {}
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput, DeviceStep]] = deque()

    def admit(self, prompts: Sequence[int], max_tokens: int) -> None:
        """Begin a phase.

        Args:
            prompts: tokens of each.
            max_tokens: of every response.
        """
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=False)
        requests = [
            Request(
                request_id=str(number),
                prompt_token_ids=[10] * length,
                sampling_params=params,
                pooling_params=None,
                arrival_time=float(number),
                block_hasher=None,
            )
            for number, length in enumerate(prompts)
        ]
        self._lengths = {request.request_id: request.num_prompt_tokens for request in requests}
        self.collected = Collected.empty(len(requests), max_tokens)
        self.schedule_s: list[float] = []
        self.update_s: list[float] = []
        self.scheduled_tokens: list[int] = []
        self._groups.admit(requests, [1] * len(requests))

    @property
    def is_done(self) -> bool:
        """True once every response has ended."""
        return not self._in_flight and not self._scheduler.has_requests()

    def schedule(self) -> None:
        """Schedule the next step, as far as two are not under way, and launch it."""
        if len(self._in_flight) > 1 or not self._scheduler.has_requests():
            return
        start = thread_time()
        scheduled = self._scheduler.schedule()
        self._groups.after_schedule()
        order = getattr(scheduled, "order", None)
        self._agreement.scheduled(scheduled.num_scheduled_tokens, self._scheduler.positions(scheduled), order)
        self.schedule_s.append(thread_time() - start)
        self.scheduled_tokens.append(scheduled.total_num_scheduled_tokens)
        self._in_flight.append((scheduled, self._output(scheduled), self._device.launch()))

    def take(self) -> None:
        """Wait for the oldest step, and take its tokens in."""
        if not self._in_flight:
            return
        scheduled, output, step = self._in_flight.popleft()
        step.synchronize()
        start = thread_time()
        update = self._scheduler.take_output(scheduled, output)
        self._agreement.sampled(update)
        self.collected.add(update)
        self.update_s.append(thread_time() - start)

    def _output(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """What a model runner would bring: a token for each sequence whose prompt has ended."""
        rows = [*scheduled.num_scheduled_tokens]
        counts = np.fromiter(scheduled.num_scheduled_tokens.values(), np.int64, len(rows))
        ends = self._scheduler.positions(scheduled) + counts
        valid = ends >= np.fromiter(map(self._lengths.__getitem__, rows), np.int64, len(rows))
        tokens = (ends % 1000 + 10).astype(np.int32)
        logprobs = np.full((len(rows), 1), -1.0, np.float32)
        lists = LogprobsLists(tokens[:, None], logprobs, np.zeros_like(tokens))
        sampled: Any = SampledTokens(tokens, None if valid.all() else valid)
        return ModelRunnerOutput(rows, {each: row for row, each in enumerate(rows)}, sampled, lists)


def run_ranks(ranks: Sequence[HostRank], prompts: Sequence[int], max_tokens: int) -> float:
    """One phase of all ranks, step by step in turns on this thread; returns its seconds.

    The ranks of a tensor-parallel group must all be among them: a device waits for its group's launches.
    """
    for rank in ranks:
        rank.admit(prompts, max_tokens)
    start = perf_counter()
    while not all(rank.is_done for rank in ranks):
        for rank in ranks:
            rank.schedule()
        for rank in ranks:
            rank.schedule()  # a queue of two
        for rank in ranks:
            rank.take()
    return perf_counter() - start


def steady_costs(rank: HostRank, batch: int) -> list[float]:
    """Processor seconds of each step of the last phase in which every one of `batch` sequences decoded a token."""
    steps = zip(rank.scheduled_tokens, rank.schedule_s, rank.update_s, strict=True)
    return [schedule + update for tokens, schedule, update in steps if tokens == batch]


def group_of_one() -> dist.ProcessGroup:
    """The default process group of a process that is alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group
