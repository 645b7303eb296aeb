"""What a benchmark runs: workloads, systems, who takes which turn when, and the memory that all of them get."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SYSTEMS = ("stock_sync", "stock_async", "ours_sync", "ours_async")
LABELS = {
    "stock_sync": "stock vLLM, synchronous",
    "stock_async": "stock vLLM, asynchronous",
    "ours_sync": "RolloutEngine, synchronous",
    "ours_async": "RolloutEngine, asynchronous",
    "unchecked_async": "the same, without its checks of the ranks",  # only where --systems names it
}
# In the environment of every process of one system, and the name of its shared memory: torchrun puts each rank into a
# session of its own, so that no process group holds them all.
TAG = "ROLLOUT_BENCH_SYSTEM"
WARM_UP_TOKENS = 8
# vLLM's default for the CPU is 128, for CUDA 16: sizes rounded up to 128 hold in both.
BLOCK_TOKENS = 128
SPARE_BLOCKS = 64
# Of a step, both systems alike; vLLM's own default for LLM on the CPU with two ranks, and on most GPUs.
MAX_NUM_BATCHED_TOKENS = 8192
BYTES_PER_ELEMENT = 2  # bfloat16


@dataclass(frozen=True)
class Workload:
    """A set of lengths and limits under a name.

    Attributes:
        max_tokens: of a response; each is run to it.
        max_prompt_tokens: prompts are cut there; None cuts where max_model_len asks for it.
        max_model_len: prompt plus response of one sequence, in tokens.
        max_num_seqs: sequences decoded at once.
    """

    max_tokens: int
    max_prompt_tokens: int | None
    max_model_len: int
    max_num_seqs: int
    batch_sizes: tuple[int, ...]


WORKLOADS = {
    "math500": Workload(128, 256, 1024, 512, (32, 64, 128, 256, 512)),
    # Of vLLM's pull request 23914, where this executor comes from (A100, TP=2).
    "pr23914": Workload(512, None, 4096, 512, (32, 64, 128, 256)),
}


@dataclass(frozen=True)
class Settings:
    """What one system's processes are told before they start.

    Attributes:
        system: one of LABELS.
        prompts: JSON-lines file with the key "problem".
        largest_batch: of all turns to come: the KV cache holds it whole.
        memory_share: of a GPU's memory that this system may fill (CUDA only).
        step_ms: of the simulated accelerator; None runs the model.
        replicas: of the engine in one job; a batch is shared out over them.
    """

    system: str
    model: str
    prompts: str
    tensor_parallel_size: int
    max_tokens: int
    max_prompt_tokens: int | None
    max_model_len: int
    max_num_seqs: int
    largest_batch: int
    enforce_eager: bool = False
    memory_share: float = 0.9
    step_ms: float | None = None
    replicas: int = 1

    @property
    def stock(self) -> bool:
        return self.system.startswith("stock_")

    @property
    def asynchronous(self) -> bool:
        return self.system.endswith("_async")

    @property
    def prompt_limit(self) -> int:
        """Tokens of a prompt, with room for the response."""
        room = self.max_model_len - self.max_tokens
        return room if self.max_prompt_tokens is None else min(room, self.max_prompt_tokens)


@dataclass(frozen=True)
class Allocation:
    """One set of systems that live side by side, and the batches that they run.

    Attributes:
        step_ms: of the simulated accelerator, which is fixed for an engine's life; None runs the model.
    """

    step_ms: float | None
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One call of generate by one system.

    Attributes:
        repeat: from 0; -1 warms up and is not counted.
        last: True for the last turn of this system in its allocation.
    """

    system: str
    batch: int
    repeat: int
    last: bool = field(default=False, compare=False)


def allocations(batches: Sequence[int], step_times_ms: Sequence[float]) -> list[Allocation]:
    """Pair step times with batches where there are as many; otherwise run every batch with every step time.

    >>> allocations([32, 64], [31.6, 34.5])
    [Allocation(step_ms=31.6, batches=(32,)), Allocation(step_ms=34.5, batches=(64,))]
    >>> allocations([32, 64], [12.0])
    [Allocation(step_ms=12.0, batches=(32, 64))]
    >>> allocations([32, 64], [])
    [Allocation(step_ms=None, batches=(32, 64))]
    """
    if not step_times_ms:
        return [Allocation(None, tuple(batches))]
    if len(step_times_ms) == len(batches):
        own = {
            step: tuple(b for b, s in zip(batches, step_times_ms, strict=True) if s == step) for step in step_times_ms
        }
        return [Allocation(step, of_step) for step, of_step in own.items()]
    return [Allocation(step, tuple(batches)) for step in dict.fromkeys(step_times_ms)]


def turns(systems: Sequence[str], batches: Sequence[int], repeats: int) -> Iterator[Turn]:
    """Everybody's warm-up with the largest batch, then batch by batch, repeat by repeat, in rotating order.

    So every repeat of one system stands between repeats of the others, and none has a fixed neighbour in time.

    >>> ["{0.system} {0.repeat}".format(turn) for turn in turns(["a", "b"], [32], repeats=2)]
    ['a -1', 'b -1', 'a 0', 'b 0', 'b 1', 'a 1']
    """
    for system in systems:
        yield Turn(system, max(batches), -1)
    for batch in batches:
        for repeat in range(repeats):
            first = repeat % len(systems)
            for system in (*systems[first:], *systems[:first]):
                yield Turn(system, batch, repeat, last=(batch, repeat) == (batches[-1], repeats - 1))


def share_of_rank(batch: int, rank: int, num_ranks: int) -> slice:
    """The rows of a batch that one rank brings; all ranks' together, in order, are the batch.

    >>> share_of_rank(5, 0, 2), share_of_rank(5, 1, 2)
    (slice(0, 2, None), slice(2, 5, None))
    """
    return slice(batch * rank // num_ranks, batch * (rank + 1) // num_ranks)


def kv_cache_gib(
    prompt_lengths: Sequence[int],
    max_tokens: int,
    max_model_len: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
) -> float:
    """GiB a rank in which a whole batch fits without preemption, and one sequence of the greatest length.

    Args:
        prompt_lengths: of the largest batch, in tokens.
        num_kv_heads: of this rank's shard.

    >>> kv_cache_gib([100], 28, 128, num_layers=1, num_kv_heads=1, head_dim=64) * 1024  # (2 + 64) blocks of 32 KiB
    2.0625
    """
    # One token more than a response has: asynchronous scheduling is a step ahead.
    blocks = sum(math.ceil((length + max_tokens + 1) / BLOCK_TOKENS) for length in prompt_lengths)
    blocks = max(blocks, math.ceil(max_model_len / BLOCK_TOKENS)) + SPARE_BLOCKS
    keys_and_values = 2 * num_layers * num_kv_heads * head_dim * BYTES_PER_ELEMENT
    return blocks * BLOCK_TOKENS * keys_and_values / 1024**3


def step_budget(prompt_lengths: Sequence[int], max_num_seqs: int, simulated: bool) -> int:
    """max_num_batched_tokens: in the simulation the whole batch's prefill is one step, so that the limit is known.

    >>> step_budget([200] * 512, 512, simulated=True), step_budget([200] * 512, 512, simulated=False)
    (102400, 8192)
    """
    return max(sum(prompt_lengths) if simulated else 0, MAX_NUM_BATCHED_TOKENS, max_num_seqs)


def limit_tokens_per_s(batch: int, step_ms: float | None) -> float | None:
    """Tokens a second of a device that is never idle: every step, the prefill's too, gives each sequence a token.

    >>> limit_tokens_per_s(512, 12.0)
    42666.66...
    """
    return None if step_ms is None else batch / step_ms * 1e3
