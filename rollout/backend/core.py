"""From our configuration to vLLM's engine core, and from our prompts to its requests."""

import gc
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import vllm.distributed.parallel_state as parallel_state
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from rollout.backend.executor import TorchrunExecutor
from rollout.backend.groups import GroupAdmission
from rollout.backend.scheduler import SteadyAsyncScheduler, SteadyScheduler
from rollout.config import RolloutConfig, SamplingConfig

GIB = 1024**3
# On the CPU vLLM would take a share of all memory; the trainer needs it. 1 GiB holds 45,000 tokens of a 135M model.
DEFAULT_CPU_KV_CACHE_GIB = 1.0


@dataclass(frozen=True)
class Core:
    """vLLM's engine core, reduced to the parts that the driver steps.

    Attributes:
        groups: admits requests to the scheduler.
        queue_depth: batches under way at once: 2 when scheduling is asynchronous, else 1.
    """

    scheduler: SteadyScheduler
    groups: GroupAdmission
    executor: TorchrunExecutor
    queue_depth: int
    engine_core: EngineCore

    @property
    def asynchronous(self) -> bool:
        return self.queue_depth > 1

    @cached_property
    def max_model_len(self) -> int:
        return self.engine_core.vllm_config.model_config.max_model_len

    def describe(self) -> dict[str, str | int]:
        """What really runs: scheduler class, executor class, queue depth, model runner class, our own C++ kernels."""
        runner = self.executor.collective_rpc(lambda worker: type(worker.model_runner).__name__)[0]
        return {
            "scheduler": type(self.scheduler).__name__,
            "executor": type(self.executor).__name__,
            "queue_depth": self.queue_depth,
            "model_runner": runner,
            "kernels": ", ".join(self.executor.kernels) or "none",
        }

    def close(self, timeout_s: float) -> None:
        """Stop the execute thread and take vLLM's groups down; the default process group stays the trainer's.

        `EngineCore.shutdown` would destroy the default group too.
        """
        self.engine_core.structured_output_manager.clear_backend()
        self.executor.shutdown(timeout_s)
        self.scheduler.shutdown()
        gc.unfreeze()  # EngineCore froze the heap it started with; without this the weights are never collected
        parallel_state.destroy_model_parallel()
        world_group, parallel_state._WORLD = parallel_state._WORLD, None
        if world_group is not None:
            world_group.destroy()


def build_core(model: str, tensor_parallel_size: int, config: RolloutConfig, on_cuda: bool) -> Core:
    """Load the model and allocate its KV cache; on every rank, with the default process group in place."""
    arguments = engine_arguments(model, tensor_parallel_size, config, on_cuda)
    engine_core = EngineCore(arguments.create_engine_config(), executor_class=TorchrunExecutor, log_stats=False)
    executor = engine_core.model_executor
    assert isinstance(executor, TorchrunExecutor)
    scheduler = engine_core.scheduler
    assert isinstance(scheduler, SteadyScheduler)
    groups = GroupAdmission(scheduler)
    return Core(scheduler, groups, executor, engine_core.batch_queue_size, engine_core)


def engine_arguments(model: str, tensor_parallel_size: int, config: RolloutConfig, on_cuda: bool) -> EngineArgs:
    """vLLM's arguments for our configuration."""
    kv_cache_gib = config.kv_cache_gib
    if kv_cache_gib is None and not on_cuda:
        kv_cache_gib = DEFAULT_CPU_KV_CACHE_GIB
    # Ranks of tokens would take the whole vocabulary on every rank; nothing here asks for them.
    additional_config: dict[str, bool | float] = {"async_scheduling": config.async_scheduling, "token_ranks": False}
    if config.simulate_step_ms is not None:
        additional_config["simulate_step_ms"] = config.simulate_step_ms
    return EngineArgs(
        model=model,
        tensor_parallel_size=tensor_parallel_size,
        distributed_executor_backend="external_launcher",
        dtype=config.dtype,
        hf_overrides={"head_dtype": config.head_dtype},
        seed=config.seed,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * GIB),
        gpu_memory_utilization=config.gpu_memory_utilization,
        block_size=config.block_size,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        async_scheduling=config.async_scheduling,
        scheduler_cls=SteadyAsyncScheduler if config.async_scheduling else SteadyScheduler,
        worker_cls="auto" if config.simulate_step_ms is None else "rollout.backend.simulated.SimulatedWorker",
        load_format="auto" if config.simulate_step_ms is None else "dummy",
        # The log-prob of the distribution that was sampled from, temperature included: what the trainer needs.
        logprobs_mode="processed_logprobs",
        skip_tokenizer_init=True,  # texts are ours: RolloutEngine.tokenizer
        use_tqdm_on_load=False,
        additional_config=additional_config,
    )


def make_requests(
    core: Core,
    prompts: Sequence[np.ndarray],
    sampling: SamplingConfig,
    streams: np.random.SeedSequence,
    prompt_numbers: Sequence[int],
) -> list[Request]:
    """One request a sequence: sample j of prompt i is request number i * n + j, and its id is that number.

    Every sequence has a random stream of its own, drawn from `streams` and its number: the same random numbers whatever
    else is in the batch, in whatever order it is scheduled, on every rank. The same tokens, too, where the logits do
    not depend on the batch; on CUDA other batch sizes take other kernels, whose roundings differ.

    Args:
        prompt_numbers: of the prompts, for their streams; a replica's prompts may be some of the job's.
    """
    params = sampling_params(core, sampling)
    # One word a sequence; a longer batch begins with the words of a shorter one.
    num_sequences = (max(prompt_numbers, default=-1) + 1) * sampling.n
    seeds = (streams.generate_state(num_sequences, np.uint64) >> 1).tolist()
    requests = []
    for index, (prompt, prompt_number) in enumerate(zip(prompts, prompt_numbers, strict=True)):
        prompt_token_ids = prompt.tolist()
        for sample in range(sampling.n):
            number = index * sampling.n + sample
            own = copy(params)
            own.seed = seeds[prompt_number * sampling.n + sample]
            requests.append(
                Request(
                    request_id=str(number),
                    prompt_token_ids=prompt_token_ids,
                    sampling_params=own,
                    pooling_params=None,
                    arrival_time=float(number),  # any clock would differ between ranks
                    block_hasher=core.engine_core.request_block_hasher,
                )
            )
    return requests


def sampling_params(core: Core, sampling: SamplingConfig) -> SamplingParams:
    """vLLM's parameters for our configuration, with the model's own end-of-sequence ids."""
    params = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=0,  # the sampled token's alone
        detokenize=False,
    )
    model_config = core.engine_core.vllm_config.model_config
    generation_config = model_config.try_get_generation_config()
    params.update_from_generation_config(generation_config, model_config.hf_text_config.eos_token_id)
    return params
