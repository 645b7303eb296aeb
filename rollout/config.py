"""What a rollout engine and one call of `generate` can be told. Checked before anything is loaded."""

from dataclasses import dataclass, field
from typing import Literal

ModelDtype = Literal["bfloat16", "float16", "float32"]
Sleep = Literal["nothing", "kv_cache", "all"]


@dataclass(frozen=True)
class RolloutConfig:
    """How the engine is built: the same on every rank.

    Args:
        tensor_parallel_size: ranks that share one copy of the engine's weights; None means all ranks of the job.
            Must divide the world size; a job of several groups runs one replica a group.
        dtype: the engine's weights and activations.
        head_dtype: of the product that makes the logits; float32 halves the log-probs' rounding error against the
            trainer's (docs/results.md) and costs little; model takes `dtype`.
        max_model_len: prompt plus response of one sequence, in tokens.
        max_num_seqs: sequences decoded at once by one tensor-parallel group.
        max_num_batched_tokens: tokens one step may process (prefill chunks); None takes vLLM's default.
        kv_cache_gib: size of the KV cache a rank, in GiB. On the CPU None means 1 GiB; on CUDA None lets
            `gpu_memory_utilization` decide.
        gpu_memory_utilization: share of a GPU's memory that the engine may fill (CUDA only).
        block_size: tokens a KV-cache block; None takes vLLM's default for the device (on the CPU 128, which decodes a
            tenth faster than 32). Samples of one prompt share it whatever the size.
        async_scheduling: True schedules step i+1 while the execute thread runs step i (a queue of two batches);
            False runs one step at a time. The tokens are the same.
        enforce_eager: True switches torch.compile and CUDA graphs off: a faster start, slower steps.
        enable_prefix_caching: True shares the KV blocks of equal prompt prefixes; emptied by every weight sync.
        sleep: what the engine gives back while the trainer trains, and takes again afterwards: nothing, the KV cache,
            or all, with the weights, which the next weight sync brings back (CUDA only; on the CPU the KV cache's
            pages always go).
        balance: True shares the prompts of all replicas out anew before each phase, by how long their responses are
            expected to be (as long as the last ones to the same prompt), and brings the responses back; `generate` is
            then called by all ranks of the job together. Nothing is done where there is one replica.
        seed: of the engine's own random streams, which the trainer's never touch.
        simulate_step_ms: run no model: each step occupies a simulated accelerator for this many milliseconds, and the
            tokens are made up. It measures the host's share of a step (benchmarks; vLLM's CPU build only).
        stall_timeout_s: a rank that generates or syncs for so long without a step counts as failed, and the job ends
            with the stacks of all ranks (rollout/failure.py).
        shutdown_timeout_s: how long `close` waits for the execute thread before it reports that it hangs.

    Raises:
        ValueError: if a number is out of range.

    >>> RolloutConfig(max_num_seqs=0)
    Traceback (most recent call last):
    ...
    ValueError: rollout.max_num_seqs is 0; it must be at least 1
    """

    tensor_parallel_size: int | None = None
    dtype: ModelDtype = "bfloat16"
    head_dtype: Literal["float32", "model"] = "float32"
    max_model_len: int = 1024
    max_num_seqs: int = 512
    max_num_batched_tokens: int | None = None
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float = 0.4
    block_size: int | None = None
    async_scheduling: bool = True
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    sleep: Sleep = "nothing"
    balance: bool = False
    seed: int = 0
    simulate_step_ms: float | None = None
    stall_timeout_s: float = 600.0
    shutdown_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"rollout.{name} is {value}; it must be at least 1")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"rollout.gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )
        for name in ("kv_cache_gib", "simulate_step_ms", "stall_timeout_s", "shutdown_timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"rollout.{name} is {value}; it must be above 0")
        if self.seed < 0:
            raise ValueError(f"rollout.seed is {self.seed}; it must be at least 0")


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. Log-probs are those of the distribution that was sampled from.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        min_p: drop tokens below this share of the likeliest token's probability; 0 drops none.
        max_tokens: of a response, its end-of-sequence token included.
        n: responses a prompt.
        ignore_eos: True runs every response to `max_tokens` (benchmarks).
        stop_token_ids: token ids that end a response, beside the model's own end-of-sequence ids.

    Raises:
        ValueError: if a number is out of range.

    >>> SamplingConfig(temperature=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: sampling.temperature is -1.0; it must be at least 0
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 64
    n: int = 1
    ignore_eos: bool = False
    stop_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, least in (("temperature", 0), ("top_k", 0), ("max_tokens", 1), ("n", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampling.top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"sampling.min_p is {self.min_p}; it must be at least 0 and below 1")
