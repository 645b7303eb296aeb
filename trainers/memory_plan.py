"""How much memory a rank will take, from the sizes of its models and the shape of its passes: plain arithmetic.

Parameters P are all that is trained, and w the bytes of one (4 in float32). What stays from the second step on:

    policy (and critic)     w P
    gradients               w P     DDP's buckets, of which the gradients are views (gradient_as_bucket_view)
    optimizer               2 w P   AdamW's two moments, in the parameters' dtype (torch.optim.AdamW)
    reference               w P'    where there is a KL penalty
    engine                  its shard of the weights, in rollout.dtype

While a minibatch takes more than one pass, the passes before the last add up in gradients of their own (DDP's no_sync),
w P once more. What autograd keeps of a pass is `trainers.activations`.
"""

from dataclasses import dataclass

from trainers.activations import Pass, Precision, head_block_bytes, kept_bytes
from trainers.config import Experiment
from trainers.devices import Device
from trainers.errors import ConfigError
from trainers.model_sizes import ModelSizes

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

MOMENTS = ("first generate", "generate", "optimize")
"""Of a run: the first phase of generation, before there are gradients and moments; a later one; the update."""


@dataclass(frozen=True)
class Models:
    """What a rank holds.

    Attributes:
        policy: without a critic's head.
        critic: of its own trunk; None without.
        value_head: True if a value head reads the policy's trunk.
        reference: True where the KL penalty keeps the first policy.
    """

    policy: ModelSizes
    critic: ModelSizes | None = None
    value_head: bool = False
    reference: bool = False

    @property
    def trained(self) -> int:
        """Parameters of the policy and the critic."""
        critic = self.critic.parameters if self.critic else 0
        return self.policy.parameters + critic + (self.policy.hidden + 1 if self.value_head else 0)


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
    tp: int,
    cache: Cache,
    minibatch: list[Pass],
    sequences: int,
    prompt: int,
    response: int,
    device: Device,
) -> dict[str, dict[str, int]]:
    """Bytes by moment and part, of one rank.

    Args:
        minibatch: the passes of the rank's largest minibatch.
        sequences: of its replica that run at once,
        prompt: tokens of the prompt of each,
        response: and of its response.
    """
    precision = Precision.of(config.model.dtype, config.model.autocast, device.on_cpu and not models.policy.windows)
    w = precision.weights
    policy, critic = models.policy, models.critic
    shard, element = engine_shard(policy, tp), DTYPE_BYTES[config.rollout.dtype]
    stays = {
        "policy": w * (models.trained - (critic.parameters if critic else 0)),
        "critic": w * critic.parameters if critic else 0,
        "reference": w * policy.parameters if models.reference else 0,
        "engine weights": sum(shard.values()) * element,
    }
    trained = w * models.trained
    updated = {"gradients": trained, "optimizer": 2 * trained}
    largest = max(minibatch, key=lambda step: step.tokens)
    generating = {"engine step": step_bytes(config, policy, tp)}
    n = config.sampling.n
    used = -(-sequences // n) * cache.blocks_of(prompt, response, n) * cache.block * cache.token_bytes
    moments = {
        "first generate": stays | {"KV cache": cache.bytes} | generating,
        # On the CPU the cache's pages were given back since; those that the sequences fill come again.
        "generate": stays
        | updated
        | {"KV cache": min(used, cache.bytes) if device.on_cpu else cache.bytes}
        | generating,
        "optimize": stays
        | updated
        | {
            "gradients": trained * (2 if len(minibatch) > 1 else 1),
            "KV cache": 0 if device.on_cpu else cache.bytes,
            "activations": activation_bytes(config, models, largest, precision),
            "head": head_bytes(policy, largest, precision),
        },
    }
    base = int(device.baseline_gib * GIB)
    packed = {"packing": shard["matrices"] * element // policy.layers} if device.on_cpu else {}
    for parts in moments.values():
        parts |= packed
        on_heap = sum(size for name, size in parts.items() if name != "KV cache")
        parts |= {"framework": base, "heap": int(on_heap * device.heap_share)}
    return {name: moments[name] for name in MOMENTS}


def activation_bytes(config: Experiment, models: Models, step: Pass, precision: Precision) -> int:
    """Kept by autograd when a pass's forward has ended, of the policy and of a critic's own trunk."""
    checkpointing = config.model.gradient_checkpointing
    kept = kept_bytes(models.policy, step, precision, checkpointing)
    if models.critic:
        kept += kept_bytes(models.critic, step, precision, checkpointing, head=False)
    if models.value_head:
        kept += step.predicting * models.policy.hidden * 4  # the value head reads float32
    return kept


def head_bytes(sizes: ModelSizes, step: Pass, precision: Precision) -> int:
    """Of the head's backward, which comes first, when all is still kept: its weight's gradient, a block of logits."""
    return sizes.vocabulary * sizes.hidden * precision.weights + head_block_bytes(sizes, step, precision)
