"""How much memory a rank will take, moment by moment, from the sizes of its models and the shape of its passes.

What training holds is `trainers.trainer_memory`'s; here the engine and its KV cache stand beside it. Moments of a run:

    loading         the models are read; on the CPU alone, where the host's memory is the one that counts
    first generate  before there are gradients and moments
    generate        with the moments, and with DDP's gradients
    update          the largest moment of an optimizer update's largest pass

On CUDA the KV cache stands there while the trainer trains, and so do the engine's weights, but for what rollout.sleep
gives back: generation and update then do not add up. On the CPU the cache's pages always go, and those that sequences
fill come again; but of an update's heap the allocator keeps what it has (glibc gives a block back to the system by
itself from 32 MiB on: mallopt(3), M_MMAP_THRESHOLD), so that the next generation stands beside it.
"""

from dataclasses import dataclass

from trainers.activations import Pass
from trainers.config import Experiment
from trainers.devices import Device
from trainers.errors import ConfigError
from trainers.model_sizes import ModelSizes
from trainers.trainer_memory import (
    Models,
    Parts,
    gradient_bytes,
    loading_bytes,
    pass_bytes,
    precision_of,
    staying_bytes,
)

GIB = 1024**3
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to it before it cuts (vocab_parallel_embedding.py)."""
CPU_BLOCK, CUDA_BLOCK = 128, 16
"""Tokens of a KV block where rollout.block_size is null: vLLM's defaults."""
CPU_KV_CACHE_GIB = 1.0
"""Where rollout.kv_cache_gib is null, on the CPU: rollout/backend/core.py."""
STEP_TOKENS = 2048
"""Where rollout.max_num_batched_tokens is null: vLLM's default."""

MMAP_THRESHOLD = 32 * 2**20
"""Bytes from which on glibc gives a freed block back by itself: the largest that its threshold grows to, on 64 bits."""


@dataclass(frozen=True)
class Cache:
    """The engine's KV cache on one rank.

    Attributes:
        token_bytes: keys and values of a token, this rank's heads of all layers.
        block: tokens of a block.
        bytes: of the whole cache.
    """

    token_bytes: int
    block: int
    bytes: int

    @property
    def blocks(self) -> int:
        """That sequences may have: vLLM keeps one for itself."""
        return max(self.bytes // (self.token_bytes * self.block) - 1, 0)

    def blocks_of(self, prompt: int, response: int, n: int) -> int:
        """Of the n responses to one prompt: they share the prompt's whole blocks (rollout/backend/groups.py).

        >>> Cache(token_bytes=1, block=16, bytes=1600).blocks_of(prompt=40, response=30, n=4)  # 2 shared, 3 each
        14
        """
        shared = prompt // self.block if n > 1 else 0
        each = -(-(prompt + response) // self.block)
        return shared + n * (each - shared)

    def sequences(self, prompt: int, response: int, n: int) -> int:
        """That fit at once, at their full length."""
        return self.blocks * n // self.blocks_of(prompt, response, n)


def engine_shard(sizes: ModelSizes, tp: int) -> dict[str, int]:
    """Parameters on one of `tp` ranks: of the layers' matrices, of the embedding, of an untied head, and of the rest.

    Queries and the MLP are cut evenly; of keys and values a rank has at least one head (vLLM's QKVParallelLinear); the
    vocabulary is padded to a multiple of 64 (VocabParallelEmbedding); norms are on every rank.
    """
    keys_and_values = 2 * sizes.hidden * sizes.key_value * sizes.layers
    matrices = (sizes.matrices - keys_and_values) // tp + keys_and_values // min(tp, sizes.kv_heads)
    rows = -(-sizes.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // tp
    embedding = rows * sizes.hidden
    return {
        "matrices": matrices,
        "embedding": embedding,
        "head": embedding if sizes.head else 0,
        "rest": sizes.norms + sizes.biases // tp,
    }


def kv_token_bytes(sizes: ModelSizes, tp: int, element: int) -> int:
    """Keys and values of one token on one rank: 2 layers heads head_dim bytes (vLLM's FullAttentionSpec)."""
    return 2 * sizes.layers * max(1, sizes.kv_heads // tp) * sizes.head_dim * element


def kv_cache(config: Experiment, sizes: ModelSizes, tp: int, device: Device) -> Cache:
    """As large as the config says; on CUDA by default what rollout.gpu_memory_utilization leaves.

    Raises:
        ConfigError: if not even one sequence of rollout.max_model_len fits.
    """
    rollout = config.rollout
    element = DTYPE_BYTES[rollout.dtype]
    token_bytes = kv_token_bytes(sizes, tp, element)
    block = rollout.block_size or (CPU_BLOCK if device.on_cpu else CUDA_BLOCK)
    if rollout.kv_cache_gib is not None or device.on_cpu:
        size = int((rollout.kv_cache_gib or CPU_KV_CACHE_GIB) * GIB)
        remedy = "raise rollout.kv_cache_gib to {:.2f}"
    else:
        assert device.memory_gib is not None
        shard = sum(engine_shard(sizes, tp).values()) * element
        beside = int(device.baseline_gib * GIB) + shard + step_bytes(config, sizes, tp)
        size = int(rollout.gpu_memory_utilization * device.memory_gib * GIB) - beside
        remedy = "raise rollout.gpu_memory_utilization or rollout.tensor_parallel_size; the cache needs {:.2f} GiB"
    needed = -(-rollout.max_model_len // block) + 1
    if size // (token_bytes * block) < needed:
        least = needed * token_bytes * block / GIB
        raise ConfigError(
            f"a KV cache of {max(size, 0) / GIB:.2f} GiB a rank holds no sequence of rollout.max_model_len="
            f"{rollout.max_model_len} tokens, at {token_bytes} bytes a token: {remedy.format(least + 0.005)}, or lower "
            "rollout.max_model_len"
        )
    return Cache(token_bytes, block, size)


def step_bytes(config: Experiment, sizes: ModelSizes, tp: int) -> int:
    """Of the engine's largest step beside weights and cache: one layer's activations, and rows of float32 logits.

    Tokens of a step times 4 hidden, 2 (queries, keys, values) and 3 MLP widths of the shard.
    """
    rollout = config.rollout
    tokens = max(rollout.max_num_batched_tokens or STEP_TOKENS, rollout.max_num_seqs)
    width = 4 * sizes.hidden + 2 * (sizes.query + 2 * sizes.key_value) // tp + 3 * sizes.intermediate // tp
    return tokens * width * DTYPE_BYTES[rollout.dtype] + rollout.max_num_seqs * sizes.vocabulary // tp * 4


def plan_memory(
    config: Experiment,
    models: Models,
    ranks: int,
    tp: int,
    cache: Cache,
    minibatch: list[Pass],
    sequences: int,
    prompt: int,
    response: int,
    device: Device,
) -> dict[str, Parts]:
    """Bytes by moment and part, of one rank.

    Args:
        minibatch: the passes of the rank's largest minibatch.
        sequences: of its replica that run at once,
        prompt: tokens of the prompt of each,
        response: and of all that follows it.
    """
    precision = precision_of(config, device.on_cpu and not models.policy.windows)
    shard, element = engine_shard(models.policy, tp), DTYPE_BYTES[config.rollout.dtype]
    stays = staying_bytes(config, models, precision, ranks)
    weights = {name: stays[name] for name in ("policy", "critic", "reference")}
    engine, asleep = {"engine weights": sum(shard.values()) * element}, config.rollout.sleep
    generating = {"engine step": step_bytes(config, models.policy, tp)}
    largest = max(minibatch, key=lambda step: step.tokens)
    gradients = gradient_bytes(config, models, precision, ranks, len(minibatch))
    update = stays | {"gradients": gradients} | pass_bytes(config, models, largest, precision)
    if device.on_cpu:
        n = config.sampling.n
        used = -(-sequences // n) * cache.blocks_of(prompt, response, n) * cache.block * cache.token_bytes
        loaded = loading_bytes(models, precision.weights)
        moments = {
            "loading": {"policy": loaded, "KV cache": cache.bytes},
            "first generate": weights | generating | {"KV cache": cache.bytes},
            "update": update,
        }
        kept = sum(update.values()) - sum(stays.values()) if widest_bytes(models, largest) < MMAP_THRESHOLD else 0
        moments["generate"] = stays | {"kept of the update": kept, "KV cache": min(used, cache.bytes)}
        for parts in moments.values():
            parts |= engine | {"packing": shard["matrices"] * element // models.policy.layers}
    else:
        resting = {} if asleep == "all" else engine
        resting |= {} if asleep != "nothing" else {"KV cache": cache.bytes}
        moments = {
            "first generate": weights | engine | generating | {"KV cache": cache.bytes},
            "generate": stays | engine | generating | {"KV cache": cache.bytes},
            "update": update | resting,
        }
    for parts in moments.values():
        on_heap = sum(size for name, size in parts.items() if name != "KV cache")
        parts |= {"framework": int(device.baseline_gib * GIB), "heap": int(on_heap * device.heap_share)}
    return moments


def widest_bytes(models: Models, step: Pass) -> int:
    """Of a pass's largest tensors: the residual stream in float32, or as wide as the MLP in 2 bytes."""
    return step.tokens * max(4 * models.policy.hidden, 2 * models.policy.intermediate)
