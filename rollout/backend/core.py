"""From our configuration to vLLM's engine core, and from our prompts to its requests."""

import gc
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import vllm.distributed.parallel_state as parallel_state
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request

from rollout.backend.executor import TorchrunExecutor
from rollout.backend.groups import GroupAdmission
from rollout.backend.memory import GIB
from rollout.backend.scheduler import SteadyAsyncScheduler, SteadyScheduler
from rollout.config import RolloutConfig, SamplingConfig
from rollout.sampling import step_seeds
from rollout.types import Asked

# On the CPU vLLM would take a share of all memory; the trainer needs it. 1 GiB holds 45,000 tokens of a 135M model.
DEFAULT_CPU_KV_CACHE_GIB = 1.0
# oneDNN keeps compiled products, one for each number of tokens in a step, of 0.3 MiB each. Its own limit of 1024 lets a
# rank grow for over a thousand phases, 256 by 2% (docs/results.md).
ONEDNN_PRODUCTS = "64"


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

    @cached_property
    def max_model_len(self) -> int:
        """Tokens of a sequence, prompt included, at most."""
        return self.engine_core.vllm_config.model_config.max_model_len

    @cached_property
    def vocabulary(self) -> int:
        """Number of token ids: from 0."""
        return self.engine_core.vllm_config.model_config.get_vocab_size()

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

        Raises:
            TimeoutError: if the execute thread hangs. vLLM's groups then stay: it may be waiting in one.
            Exception: of the worker's shutdown.
        """
        try:
            self.engine_core.structured_output_manager.clear_backend()
            self.executor.shutdown(timeout_s)
        finally:
            self.scheduler.shutdown()
            gc.unfreeze()  # EngineCore froze the heap it started with; without this the weights are never collected
            if self.executor.thread.has_ended:
                destroy_vllm_groups()


def destroy_vllm_groups() -> None:
    """Those that vLLM has made; the default process group stays."""
    parallel_state.destroy_model_parallel()
    world_group, parallel_state._WORLD = parallel_state._WORLD, None
    if world_group is not None:
        world_group.destroy()


def build_core(model: str, tensor_parallel_size: int, config: RolloutConfig, on_cuda: bool) -> Core:
    """Load the model and allocate its KV cache; on every rank, with the default process group in place.

    What fails leaves nothing behind: another one can be built.
    """
    if not on_cuda:
        os.environ.setdefault(
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_PRODUCTS
        )  # read once, when the first product is compiled
    arguments = engine_arguments(model, tensor_parallel_size, config, on_cuda)
    executor: TorchrunExecutor | None = None

    def make_executor(vllm_config: VllmConfig) -> TorchrunExecutor:
        nonlocal executor
        executor = TorchrunExecutor(vllm_config)
        return executor

    try:
        # A function in place of the class: where the rest of the core fails, nobody else knows the executor.
        engine_core = EngineCore(arguments.create_engine_config(), executor_class=make_executor, log_stats=False)
    except BaseException:
        if executor is not None:
            executor.shutdown()
        destroy_vllm_groups()
        raise
    assert executor is not None
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
    additional_config: dict[str, bool | float | str] = {
        "async_scheduling": config.async_scheduling,
        "token_ranks": False,
        "sleep": config.sleep,
    }
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
        enable_sleep_mode=on_cuda and config.sleep != "nothing",
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
    core: Core, asked: Sequence[Asked], sampling: SamplingConfig, streams: Sequence[int]
) -> list[Request]:
    """One request a sequence: the samples of the first prompt, then of the second; its id is its number.

    Every sequence has a random stream of its own: the same random numbers whatever else is in the batch, in whatever
    order it is scheduled, on every rank. The same tokens, too, where the logits do not depend on the batch; on CUDA
    other batch sizes take other kernels, whose roundings differ.

    On the CPU, and in vLLM's V2 model runner, a draw is a function of stream and position, so that a sequence that goes
    on draws what it would have drawn uncut. vLLM's V1 model runner on CUDA counts a request's draws from its first:
    there a sequence that goes on gets a seed of stream and position, other draws than those of its start.

    Args:
        streams: (sequences,) from `rollout.sampling.request_streams`.
    """
    params = sampling_params(core, sampling)
    counts_from_start = not current_platform.is_cpu() and not core.engine_core.vllm_config.use_v2_model_runner
    requests: list[Request] = []
    for of_prompt in asked:
        prompt_token_ids = of_prompt.prompt_ids.tolist()
        for _ in range(of_prompt.samples):
            number = len(requests)
            own = copy(params)
            own.max_tokens, own.seed = of_prompt.max_tokens, int(streams[number])
            if counts_from_start and of_prompt.stream is not None:
                own.seed = continued_seed(own.seed, len(prompt_token_ids))
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


def continued_seed(stream: int, position: int) -> int:
    """Of a request that goes on from `position`, where the sampler counts its draws from the request's start.

    >>> continued_seed(1, 5) != continued_seed(1, 6)
    True
    """
    return int(step_seeds(np.array([stream], np.uint64), np.array([position]))[0])


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
