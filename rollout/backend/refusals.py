"""What the executor refuses when it is built: what would make ranks decide differently, and settings that differ."""

from typing import Any

from vllm.config import VllmConfig

from rollout.world import gathered


def refuse_what_ranks_decide_alone(config: VllmConfig) -> None:
    """Every rank runs its own scheduler, so nothing may depend on the clock, the queues or the network of one of them.

    Raises:
        ValueError: names the setting, the reason and what to do.
    """
    parallel = config.parallel_config
    problems = {
        "kv_transfer_config": (
            config.kv_transfer_config is not None,
            "a transfer is done at another moment on each rank, and each would schedule its requests in another step",
        ),
        "ec_transfer_config": (
            config.ec_transfer_config is not None,
            "a transfer is done at another moment on each rank, and each would schedule its requests in another step",
        ),
        "scheduling_policy='priority'": (
            config.scheduler_config.policy == "priority",
            "requests of one priority are ordered by each rank's clock; 'fcfs' takes them as they were added",
        ),
        f"data_parallel_size={parallel.data_parallel_size}": (
            parallel.data_parallel_size > 1,
            "vLLM's replicas step each other over the network; start more ranks instead: each tensor-parallel group is "
            "a replica",
        ),
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}": (
            parallel.pipeline_parallel_size > 1,
            "a rank without the last stage has no tokens to schedule by; use tensor_parallel_size",
        ),
    }
    for setting, (given, reason) in problems.items():
        if given:
            raise ValueError(f"{setting} cannot be used in the ranks of a torchrun job: {reason}; leave it out")


def refuse_different_settings(config: VllmConfig) -> None:
    """Compare what decides about schedules and tokens; all ranks of the job call it together.

    Raises:
        ValueError: on every rank, if two of them have different values; names them.
    """
    everyones = gathered(_decisive_settings(config))
    for rank, theirs in enumerate(everyones):
        for name, value in theirs.items():
            if value != everyones[0][name]:
                raise ValueError(
                    f"{name} is {value!r} on rank {rank} and {everyones[0][name]!r} on rank 0: every rank schedules "
                    "and draws by itself, so pass the same on every rank"
                )


def _decisive_settings(config: VllmConfig) -> dict[str, Any]:
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
    return {
        "model": model.model,
        "seed": model.seed,
        "dtype": str(model.dtype),
        "max_model_len": model.max_model_len,
        "enforce_eager": model.enforce_eager,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "enable_chunked_prefill": scheduler.enable_chunked_prefill,
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
        "scheduler_cls": str(scheduler.scheduler_cls),
        "block_size": cache.block_size,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "async_scheduling": config.additional_config.get("async_scheduling", True),
    }
