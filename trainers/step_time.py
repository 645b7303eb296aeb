"""How long a training step will take, phase by phase, on a device whose rates are known: plain arithmetic.

A sum of rooflines: each kind of work takes the longer of its arithmetic and its memory traffic, and kinds follow one
another (Williams et al. 2009, doi:10.1145/1498765.1498785). A matrix product of T rows with M weights is 2 T M
operations; attention of Q pairs of query and key 4 Q an element of the heads (scores, and their sum of values); a
backward pass twice the forward, and attention's 2.5 times, since it computes its scores again (Dao 2023,
arXiv:2307.08691).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainers.activations import Pass, Precision, layer_bytes
from trainers.config import Experiment
from trainers.devices import Device
from trainers.memory_plan import DTYPE_BYTES, STEP_TOKENS, Models, engine_shard, kv_token_bytes
from trainers.model_sizes import ModelSizes

PHASES = ("sync", "generate", "reward", "no_grad", "optimize")
FORWARD_TRAVELS, TRAVELS = 4, 12
"""Bytes that the operations between the products read and write, for each that autograd keeps: in a forward pass, and
in forward and backward. Counted for the default model: norms with their casts and the residual 98 bytes an element of
the stream, rotation 32 of queries and keys, gathering 24 of queries, keys and values, what comes back 18 of queries,
the MLP 10 of its width: 148 KB a token and layer, of which 39 are kept; a backward pass twice that."""
ADAM_BYTES = 7
"""Elements that an update of one parameter reads and writes: weight, gradient and two moments in, three of them out."""
CLIP_BYTES = 3
"""The same of clipping: read for the norm, read and written to scale."""

Parts = dict[str, float]
"""Seconds by kind of work."""


@dataclass(frozen=True)
class Load:
    """What one rank, and its replica, do in a step.

    Attributes:
        prompts: tokens of each prompt of the replica's phase of generation.
        n: responses a prompt.
        response: tokens of each.
        responses: that the rank scores and trains on.
        forward: the passes without gradient.
        minibatches: the passes of each update.
    """

    prompts: Sequence[int]
    n: int
    response: int
    responses: int
    forward: list[Pass]
    minibatches: list[list[Pass]]


def plan_time(config: Experiment, models: Models, load: Load, tp: int, ranks: int, device: Device) -> dict[str, Parts]:
    """Seconds of one rank's step by phase and kind of work; a phase's are the sum."""
    return {
        "sync": sync_seconds(config, models.policy, tp, device),
        "generate": generate_seconds(config, models.policy, load, tp, device),
        "reward": {"host": load.responses * device.reward_us * 1e-6},
        "no_grad": no_grad_seconds(config, models, load, device),
        "optimize": optimize_seconds(config, models, load, ranks, device),
    }


def bottleneck(phases: dict[str, Parts]) -> tuple[str, str, float]:
    """The phase and kind of work that takes the longest, and its share of the step.

    >>> bottleneck({"sync": {"casts": 1.0}, "generate": {"keys and values": 3.0, "products": 4.0}})
    ('generate', 'products', 0.5)
    """
    seconds, phase, kind = max((each, phase, kind) for phase, parts in phases.items() for kind, each in parts.items())
    return phase, kind, seconds / max(sum(sum(parts.values()) for parts in phases.values()), 1e-12)


def sync_seconds(config: Experiment, sizes: ModelSizes, tp: int, device: Device) -> Parts:
    """The engine's shard copied from the policy, and on the CPU its layers packed again."""
    shard, element = engine_shard(sizes, tp), DTYPE_BYTES[config.rollout.dtype]
    parts = {"casts": sum(shard.values()) * element / (device.cast_gb_per_s * 1e9)}
    if device.pack_gb_per_s:
        parts["packing"] = shard["matrices"] * element / (device.pack_gb_per_s * 1e9)
    return parts


def generate_seconds(config: Experiment, sizes: ModelSizes, load: Load, tp: int, device: Device) -> Parts:
    """Every prompt prefilled once, then a decode step for each token of a response and batch that runs at once."""
    shard, element = engine_shard(sizes, tp), DTYPE_BYTES[config.rollout.dtype]
    matrices, head = shard["matrices"], shard["head"] or shard["embedding"]
    sequences = len(load.prompts) * load.n
    at_once = min(sequences, config.rollout.max_num_seqs)
    steps = -(-sequences // at_once) * load.response
    prompt_tokens = sum(load.prompts)
    rate, reads = device.engine_bf16_tflops * 1e12, device.memory_gb_per_s * 1e9
    pairs = sum(length * length for length in load.prompts) / 2
    prefill_attention = 4 * pairs * sizes.query / tp * sizes.layers
    prefill_steps = -(-prompt_tokens // max(config.rollout.max_num_batched_tokens or STEP_TOKENS, at_once))
    context = prompt_tokens / len(load.prompts) + load.response / 2
    kv_bytes = sequences * load.response * context * kv_token_bytes(sizes, tp, element)
    arithmetic = 2 * (matrices + head) * at_once / rate
    weights = (matrices + head) * element / reads
    # Written and read between the products of a layer: four widths of the stream, queries and keys, and the MLP's.
    width = 4 * sizes.hidden + 2 * (sizes.query + 2 * sizes.key_value) // tp + 3 * sizes.intermediate // tp
    between = 2 * width * sizes.layers * element * (sequences * load.response + prompt_tokens) / reads
    parts = {
        "prefill": (2 * matrices * prompt_tokens + prefill_attention) / rate,
        "decode products": steps * max(arithmetic, weights),
        "keys and values": kv_bytes / (device.kv_gb_per_s * 1e9),
        "between products": between,
    }
    if tp > 1:
        parts["all-reduce"] = (steps + prefill_steps) * 2 * sizes.layers * device.engine_all_reduce_us * 1e-6
    host = (steps + prefill_steps) * (device.host_step_ms * 1e-3 + at_once * device.host_sequence_us * 1e-6)
    # Behind a device that runs by itself the host is seen only where it takes longer.
    hidden = sum(parts.values()) if config.rollout.async_scheduling and not device.on_cpu else 0.0
    return parts | {"host": max(host - hidden, 0.0)}


def forward_flops(sizes: ModelSizes, step: Pass) -> tuple[float, float]:
    """Operations of one pass through the layers: of its products, and of its attention."""
    return 2.0 * sizes.matrices * step.tokens, 4.0 * step.attended * sizes.query * sizes.layers


def head_flops(sizes: ModelSizes, step: Pass) -> float:
    """Of the output head's product."""
    return 2.0 * sizes.vocabulary * sizes.hidden * step.predicting


def no_grad_seconds(config: Experiment, models: Models, load: Load, device: Device) -> Parts:
    """Old log-probs, values and the reference's log-probs, as far as they are wanted (trainers/no_grad_pass.py)."""
    trunks: list[tuple[ModelSizes, bool]] = []  # and whether the head runs
    wants_logprobs = config.algorithm.needs_old_logprobs
    if wants_logprobs or models.value_head:
        trunks.append((models.policy, wants_logprobs))
    if models.critic:
        trunks.append((models.critic, False))
    if models.reference:
        trunks.append((models.policy, True))
    precision = Precision.of(config.model.dtype, config.model.autocast, device.on_cpu)
    parts = {"products": 0.0, "attention": 0.0, "head": 0.0, "between products": 0.0}
    for sizes, head in trunks:
        for step in load.forward:
            products, attention = forward_flops(sizes, step)
            parts["products"] += products / _rate(device, precision)
            parts["attention"] += attention / (device.attention_tflops * 1e12)
            parts["head"] += head_flops(sizes, step) / _rate(device, precision) if head else 0.0
            parts["between products"] += _between(sizes, step, precision, device, FORWARD_TRAVELS)
    return parts


def optimize_seconds(config: Experiment, models: Models, load: Load, ranks: int, device: Device) -> Parts:
    """Forward and backward of every pass, a gradient's way through the ranks an update, clipping and AdamW.

    The head runs four products instead of three: its logits are computed again (trainers/logprobs.py). Gradient
    checkpointing runs the layers' forward once more.
    """
    precision = Precision.of(config.model.dtype, config.model.autocast, device.on_cpu)
    rate = _rate(device, precision)
    again = 1 if config.model.gradient_checkpointing else 0
    parts = {"products": 0.0, "attention": 0.0, "head": 0.0, "between products": 0.0, "weights": 0.0}
    trunks = [models.policy, *([models.critic] if models.critic else [])]
    trained_bytes = models.trained * precision.weights
    stream = device.memory_gb_per_s * 1e9
    for minibatch in load.minibatches:
        for step in minibatch:
            for sizes in trunks:
                products, attention = forward_flops(sizes, step)
                parts["products"] += (3 + again) * products / rate
                parts["attention"] += (3.5 + again) * attention / (device.attention_tflops * 1e12)
                parts["between products"] += _between(sizes, step, precision, device, TRAVELS + 2 * again)
            parts["head"] += 4 * head_flops(models.policy, step) / rate
            # The weights are cast, their gradients made in the products' dtype, cast back, and added up.
            parts["weights"] += (5 if precision.casts else 3) * trained_bytes / stream
        parts["weights"] += (ADAM_BYTES + CLIP_BYTES) * trained_bytes / stream
    if ranks > 1:
        parts["all-reduce"] = len(load.minibatches) * trained_bytes / (device.all_reduce_gb_per_s * 1e9)
    return parts


def _between(sizes: ModelSizes, step: Pass, precision: Precision, device: Device, travels: int) -> float:
    """Of all that lies between the products: as many bytes as autograd keeps, so many times through memory."""
    return travels * sizes.layers * layer_bytes(sizes, step, precision) / (device.memory_gb_per_s * 1e9)


def _rate(device: Device, precision: Precision) -> float:
    return (device.bf16_tflops if precision.products == 2 else device.f32_tflops) * 1e12
