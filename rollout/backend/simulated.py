"""A simulated accelerator: the real engine, scheduler, executor and input preparation around a forward that takes time.

It measures the host's share of a step on a machine without an accelerator, for any step time, for our engine and for
stock vLLM alike:

    RolloutConfig(simulate_step_ms=12.0)
    LLM(model, worker_cls="rollout.backend.simulated.SimulatedWorker",
        additional_config={"simulate_step_ms": 12.0, "async_scheduling": True})

The worker and vLLM's V1 model runner are the CPU's. The forward, the logits and the sampling are not run: the launch of
the forward puts a step on a `VirtualDevice`, and the tokens, a function of request and position, may be read once the
device has ended it. Asynchronous scheduling is what it is on CUDA, and not what it is on the CPU: `sample_tokens`
returns at once, the sampled ids stay "on the device" for the next step's inputs, and who asks for the output waits.

What it leaves out: the host's time for launching kernels (little where CUDA graphs run), copies between host and
device, and the differences between vLLM's two model runners; on CUDA the V2 runner may prepare its inputs faster.

Keys of vLLM's additional_config:
    simulate_step_ms: milliseconds that every step takes, prompts or not.
    async_scheduling: True (the default) as on CUDA; False waits for each step before the next is scheduled.
    simulate_stops: N ends a response at each token with probability 1/N; without it no token ends a sequence.
"""

import hashlib
import mmap
import os
import re
import tempfile
from copy import copy
from typing import Any

import numpy as np
import torch
import vllm.v1.worker.gpu_model_runner as gpu_model_runner
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsTensors, ModelRunnerOutput, SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput

from rollout.backend.sampler import RequestSeeds
from rollout.backend.virtual_device import DeviceStep, LaunchBoard, VirtualDevice, board_bytes, map_board


class SimulatedWorker(CPUWorker):
    """vLLM's CPU worker with a SimulatedRunner; see the module for how to ask for it.

    It also sets `scheduler_config.async_scheduling`, which vLLM's CPU platform has switched off by then and which the
    engine core reads after the worker is built.

    Raises:
        ValueError: for a configuration that cannot be simulated.
    """

    def init_device(self) -> None:
        """vLLM's, with a runner whose device takes a set time a step."""
        step_ms = _checked_step_ms(self.vllm_config)
        self.scheduler_config.async_scheduling = False  # the parent builds a runner, which would ask for CUDA events
        if self.distributed_init_method.startswith("env://"):
            # The CPU communicator's shared memory is named after what follows the last ":", and two jobs of stock vLLM
            # on one host collide there. With a name of its own on each rank it does without: nothing is communicated.
            self.distributed_init_method += f":{os.getpid()}"
        super().init_device()
        self.scheduler_config.async_scheduling = self.vllm_config.additional_config.get("async_scheduling", True)
        device = VirtualDevice(step_ms / 1e3, _shared_board())
        self.model_runner = SimulatedRunner(self.vllm_config, device)

    def determine_available_memory(self) -> int:
        """What was asked for, whatever the machine has: the cache is never touched."""
        given = self.cache_config.kv_cache_memory_bytes
        return super().determine_available_memory() if given is None else given

    def _should_warm_up_model(self) -> bool:
        return False


class UntouchedMemory(TorchFunctionMode):
    """Makes `torch.zeros` reserve addresses without writing to them: no memory is used until somebody does."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (torch.empty if func is torch.zeros else func)(*args, **kwargs or {})


class SimulatedRunner(CPUModelRunner):
    """vLLM's V1 model runner, whose forward puts a step on a virtual device.

    Args:
        vllm_config: of the worker.
        device: for this rank.
    """

    def __init__(self, vllm_config: VllmConfig, device: VirtualDevice) -> None:
        scheduler_config = vllm_config.scheduler_config
        asynchronous, scheduler_config.async_scheduling = scheduler_config.async_scheduling, False
        try:
            super().__init__(vllm_config, torch.device("cpu"))
        finally:
            scheduler_config.async_scheduling = asynchronous
        self.use_async_scheduling = asynchronous
        # The parent makes its outputs by this name, with CUDA's streams and events. No CPU runner can use that class.
        gpu_model_runner.AsyncGPUModelRunnerOutput = SimulatedOutput
        self._virtual_device = device
        self._step: DeviceStep | None = None
        self._words, self._end = _vocabulary(vllm_config.model_config)
        self._stops: int | None = vllm_config.additional_config.get("simulate_stops")

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """vLLM's; logits are the device's work, and left out."""
        super().load_model(load_dummy_weights)
        self.model.compute_logits = lambda hidden_states: hidden_states  # the device's work, too

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; request seeds are then kept here."""
        super().initialize_kv_cache(*args, **kwargs)
        self._request_seeds = RequestSeeds(self)  # now: the parent may have replaced its input batch

    def initialize_kv_cache_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, in memory that nobody touches."""
        with UntouchedMemory():
            return super().initialize_kv_cache_tensors(*args, **kwargs)

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        """vLLM's, around the simulated device's step."""
        if scheduler_output.scheduled_new_reqs or scheduler_output.finished_req_ids:
            _give_seeds(scheduler_output)
            self._request_seeds.admit(scheduler_output)
        return super().execute_model(scheduler_output, intermediate_tensors)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """vLLM's; the output says when the device was busy.

        Raises:
            ValueError: if there is a grammar to apply.
        """
        if grammar_output is not None:
            raise ValueError("the simulated accelerator has no logits to apply a grammar to: drop structured outputs")
        output = super().sample_tokens(None)
        step, self._step = self._step, None
        if step is not None and isinstance(output, ModelRunnerOutput):
            output.device_span = step.span  # as the asynchronous output has it
        return output

    def warming_up_model(self) -> None:
        """Nothing is compiled."""

    def _model_forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._step = self._virtual_device.launch()
        return torch.empty(len(input_ids), 1)  # stands for the hidden states; the parent picks rows of it

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        """What the device has sampled when it ends the step; the host must not look at it before."""
        metadata = self.input_batch.sampling_metadata
        self.input_batch.update_async_output_token_ids()
        seeds = self._request_seeds.of_step(len(logits))
        tokens = simulated_tokens(seeds, self._words, self._end, self._stops)
        num_logprobs = metadata.max_num_logprobs
        logprobs = None if num_logprobs is None else _logprobs(seeds, tokens, num_logprobs)
        return SamplerOutput(torch.from_numpy(tokens[:, None]), logprobs)

    def _to_list(self, sampled_token_ids: torch.Tensor) -> list[list[int]]:
        """Synchronous scheduling: where CUDA waits for the copy of the ids."""
        assert self._step is not None
        self._step.synchronize()
        return sampled_token_ids.tolist()

    def _get_or_create_async_output_copy_stream(self) -> DeviceStep | None:
        """Asynchronous scheduling: what the parent hands to its output object as the stream to wait for."""
        return self._step

    def _get_prompt_logprobs_dict(self, *args: Any) -> dict:
        if self.num_prompt_logprobs:
            raise ValueError("the simulated accelerator has no log-probs of prompts: leave prompt_logprobs out")
        return {}

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        """The device's work."""


class SimulatedOutput(AsyncGPUModelRunnerOutput):
    """A step's output under asynchronous scheduling: `get_output` waits for the device, then works as on CUDA.

    Attributes:
        async_copy_ready_event: the device's step, in the place of a CUDA event.
        sampled_token_ids_cpu: (rows, 1) int32, not to be read before that step has ended.
    """

    def __init__(
        self,
        model_runner_output: ModelRunnerOutput,
        sampled_token_ids: torch.Tensor,
        logprobs_tensors: LogprobsTensors | None,
        invalid_req_indices: list[int],
        async_output_copy_stream: DeviceStep,
        vocab_size: int,
        **unused: Any,
    ) -> None:
        self.async_copy_ready_event = async_output_copy_stream
        self.sampled_token_ids_cpu = self._sampled_token_ids = sampled_token_ids
        self._logprobs_tensors_cpu = self._logprobs_tensors = logprobs_tensors
        self._model_runner_output = model_runner_output
        self._invalid_req_indices = invalid_req_indices
        self._num_nans = self._num_nans_cpu = self._has_fault = None
        self.vocab_size = vocab_size

    @property
    def device_span(self) -> tuple[float, float] | None:
        """When the device began and ended the step, perf_counter seconds; valid after `get_output`."""
        return self.async_copy_ready_event.span


def simulated_tokens(seeds: np.ndarray, words: np.ndarray, end: int, stops: int | None) -> np.ndarray:
    """One token a row: any word alike, or with probability 1 / `stops` the end of the sequence.

    Args:
        seeds: (rows,) int64, at least 0, of request and position: `RequestSeeds.of_step`.
        words: (words,) int32, ids of tokens that end nothing.
        end: id of the end-of-sequence token.
        stops: None for no end.

    Returns:
        (rows,) int32.

    >>> seeds = np.array([14, 7, 2**40])
    >>> simulated_tokens(seeds, np.arange(10, 20, dtype=np.int32), end=2, stops=None).tolist()
    [14, 17, 16]
    >>> simulated_tokens(seeds, np.arange(10, 20, dtype=np.int32), end=2, stops=1).tolist()
    [2, 2, 2]
    """
    tokens = words[seeds % len(words)]
    if stops is not None:
        tokens[(seeds >> 32) % stops == 0] = end
    return tokens


def _logprobs(seeds: np.ndarray, tokens: np.ndarray, num_logprobs: int) -> LogprobsTensors:
    """Of the sampled token, above -4 and at most 0; those of `num_logprobs` others only fill their places."""
    if num_logprobs < 0:
        raise ValueError(f"the simulated accelerator has no log-probs of {num_logprobs} (all) tokens: give a number")
    sampled = (seeds >> 47).astype(np.float32) / np.float32(-(2**14))  # 16 of the 63 bits, over 2**14
    columns = np.arange(num_logprobs + 1, dtype=np.int32)
    return LogprobsTensors(
        torch.from_numpy(np.maximum(tokens[:, None] - columns, 0)),
        torch.from_numpy(sampled[:, None] - columns.astype(np.float32)),
        torch.ones(len(tokens), dtype=torch.int64),
    )


def _give_seeds(scheduler_output: SchedulerOutput) -> None:
    """A seed for each new request that has none: its id's hash, without the part that vLLM draws anew on each rank."""
    for request in scheduler_output.scheduled_new_reqs:
        if request.sampling_params.seed is None:
            request_id = re.sub(r"-[0-9a-f]{8}$", "", request.req_id)
            request.sampling_params = copy(request.sampling_params)
            request.sampling_params.seed = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=7).digest())


def _vocabulary(model_config: Any) -> tuple[np.ndarray, int]:
    """Token ids that end no sequence, (words,) int32, and one that does."""
    generation_config = model_config.try_get_generation_config()
    ends: set[int] = set()
    for given in (generation_config.get("eos_token_id"), getattr(model_config.hf_text_config, "eos_token_id", None)):
        ends |= {given} if isinstance(given, int) else set(given or ())
    words = np.setdiff1d(np.arange(model_config.get_vocab_size(), dtype=np.int32), list(ends))
    return words.astype(np.int32), min(ends, default=0)


def _shared_board() -> LaunchBoard:
    """The launch board of this rank's tensor-parallel group, in a file that has no name once every rank mapped it."""
    group = get_tp_group()
    num_ranks, rank = group.world_size, group.rank_in_group
    if num_ranks == 1:
        return LaunchBoard.alone()
    paths: list[str | None] = [None]
    if rank == 0:
        file, paths[0] = tempfile.mkstemp(prefix="simulated-accelerator-")
        os.truncate(file, board_bytes(num_ranks))
        os.close(file)
    torch.distributed.broadcast_object_list(paths, src=group.ranks[0], group=group.cpu_group)
    path = paths[0]
    assert path is not None
    try:
        with open(path, "r+b") as shared:
            memory = mmap.mmap(shared.fileno(), board_bytes(num_ranks))
        torch.distributed.barrier(group.cpu_group)
    finally:
        if rank == 0:
            os.unlink(path)
    return map_board(memory, rank, num_ranks)


def _checked_step_ms(vllm_config: VllmConfig) -> float:
    """The step time asked for, where the rest of the configuration can be simulated."""
    step_ms = vllm_config.additional_config.get("simulate_step_ms")
    if not isinstance(step_ms, int | float) or not step_ms > 0:
        raise ValueError(
            f"simulate_step_ms is {step_ms!r}; the simulated accelerator needs a number of milliseconds above 0 in "
            "additional_config"
        )
    stops = vllm_config.additional_config.get("simulate_stops")
    if stops is not None and not (isinstance(stops, int) and stops >= 1):
        raise ValueError(f"simulate_stops is {stops!r}; it must be a whole number of tokens, at least 1, or left out")
    parallel = vllm_config.parallel_config
    problems = {
        "a platform other than the CPU (install vLLM's CPU build)": not current_platform.is_cpu(),
        "vLLM's V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "pipeline_parallel_size above 1": parallel.pipeline_parallel_size > 1,
        "data_parallel_size above 1": parallel.data_parallel_size > 1,
        "speculative decoding": vllm_config.speculative_config is not None,
        "pooling models": vllm_config.model_config.runner_type == "pooling",
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"the simulated accelerator cannot run {problem}")
    return float(step_ms)
