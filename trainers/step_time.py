"""How long a training step will take, phase by phase, on a device whose rates are known: plain arithmetic.

A sum of rooflines: each kind of work takes the longer of its arithmetic and its memory traffic, and kinds follow one
another (Williams et al. 2009, doi:10.1145/1498765.1498785). A matrix product of T rows with M weights is 2 T M
operations; attention of Q pairs of query and key 4 Q an element of the heads (scores, and their sum of values); a
backward pass twice the forward, and attention's 2.5 times, since it computes its scores again (Dao 2023,
arXiv:2307.08691).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainers.activations import WIDE, Pass, Precision, layer_bytes
from trainers.config import Experiment
from trainers.devices import Device
from trainers.memory_plan import DTYPE_BYTES, STEP_TOKENS, engine_shard, kv_token_bytes
from trainers.model_sizes import ModelSizes
from trainers.trainer_memory import Models, is_sharded, precision_of

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
        response: tokens of each that the policy samples.
        responses: that the rank scores and trains on.
        forward: the passes without gradient.
        minibatches: the passes of each update.
        observed: tokens that an environment adds to a response.
        parts: of a response that is carried from step to step: the tokens that it has, and those that the step adds;
            of every part the step has as many rows as prompts times n. One part where none is carried.
    """

    prompts: Sequence[int]
    n: int
    response: int
    responses: int
    forward: list[Pass]
    minibatches: list[list[Pass]]
    observed: int = 0
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def rows(self) -> int:
        """Of each part."""
        return len(self.prompts) * self.n

    @property
    def sequences(self) -> int:
        """That a phase of generation works on."""
        return self.rows * len(self.parts or "1")


def parts_of(response: int, tokens_per_step: int | None, max_age: int) -> tuple[tuple[int, int], ...]:
    """How partial rollouts cut a response, as trainers/partial.py does: in its last step it runs to its end.

    >>> parts_of(100, 40, max_age=4), parts_of(100, 10, max_age=2), parts_of(100, None, max_age=4)
    (((0, 40), (40, 40), (80, 20)), ((0, 10), (10, 10), (20, 80)), ((0, 100),))
    """
    if tokens_per_step is None:
        return ((0, response),)
    steps = min(-(-response // tokens_per_step), max_age + 1)
    begun = tuple((age * tokens_per_step, tokens_per_step) for age in range(steps - 1))
    return (*begun, ((steps - 1) * tokens_per_step, response - (steps - 1) * tokens_per_step))


def plan_time(config: Experiment, models: Models, load: Load, tp: int, ranks: int, device: Device) -> dict[str, Parts]:
    """Seconds of one rank's step by phase and kind of work; a phase's are the sum."""
    return {
        "sync": sync_seconds(config, models.policy, tp, device),
        "generate": generate_seconds(config, models.policy, load, tp, device),
        "reward": {"host": load.responses * device.reward_us * 1e-6},
        "no_grad": no_grad_seconds(config, models, load, ranks, device),
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
    """Every prompt prefilled once, and what responses have already; then a decode step for each token and batch.

    Of several turns the prefix cache has all but what the environment said; of carried responses it has nothing, since
    the weights are others.
    """
    shard, element = engine_shard(sizes, tp), DTYPE_BYTES[config.rollout.dtype]
    matrices, head = shard["matrices"], shard["head"] or shard["embedding"]
    parts_of_responses = load.parts or ((0, load.response),)
    at_once = min(load.sequences, config.rollout.max_num_seqs)
    steps = -(-load.sequences // at_once) * max(new for _, new in parts_of_responses)
    prompt = sum(load.prompts) / len(load.prompts)
    prompt_tokens = sum(load.prompts) + load.rows * (load.observed + sum(had for had, _ in parts_of_responses))
    rate, reads = device.engine_bf16_tflops * 1e12, device.memory_gb_per_s * 1e9
    pairs = sum(length * length for length in load.prompts) / 2
    pairs += load.rows * sum((prompt + had) * (had + load.observed) for had, _ in parts_of_responses)
    prefill_attention = 4 * pairs * sizes.query / tp * sizes.layers
    prefill_steps = -(-prompt_tokens // max(config.rollout.max_num_batched_tokens or STEP_TOKENS, at_once))
    decoded = load.rows * sum(new for _, new in parts_of_responses)
    attended = load.rows * sum(new * (prompt + had + (new + load.observed) / 2) for had, new in parts_of_responses)
    kv_bytes = attended * kv_token_bytes(sizes, tp, element)
    arithmetic = 2 * (matrices + head) * at_once / rate
    weights = (matrices + head) * element / reads
    # Written and read between the products of a layer: four widths of the stream, queries and keys, and the MLP's.
    width = 4 * sizes.hidden + 2 * (sizes.query + 2 * sizes.key_value) // tp + 3 * sizes.intermediate // tp
    between = 2 * width * sizes.layers * element * (decoded + prompt_tokens) / reads
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


def no_grad_seconds(config: Experiment, models: Models, load: Load, ranks: int, device: Device) -> Parts:
    """Old log-probs, values and the reference's log-probs, as far as they are wanted (trainers/no_grad_pass.py)."""
    trunks: list[tuple[ModelSizes, bool]] = []  # and whether the head runs
    wants_logprobs = config.needs_old_logprobs
    if wants_logprobs or models.value_head:
        trunks.append((models.policy, wants_logprobs))
    if models.critic:
        trunks.append((models.critic, False))
    if models.reference:
        trunks.append((models.policy, True))
    precision = precision_of(config, device.on_cpu)
    parts = {"products": 0.0, "attention": 0.0, "head": 0.0, "between products": 0.0}
    for sizes, head in trunks:
        for step in load.forward:
            products, attention = forward_flops(sizes, step)
            parts["products"] += products / _rate(device, precision)
            parts["attention"] += attention / (device.attention_tflops * 1e12)
            parts["head"] += head_flops(sizes, step) / _rate(device, precision) if head else 0.0
            parts["between products"] += _between(sizes, step, precision, device, FORWARD_TRAVELS)
        if is_sharded(config) and ranks > 1:
            gathered = gather_seconds(config, sizes, precision, device) * len(load.forward)
            parts["gather"] = parts.get("gather", 0.0) + gathered
    return parts


def gather_seconds(config: Experiment, sizes: ModelSizes, precision: Precision, device: Device) -> float:
    """A sharded model's weights made whole once, or its gradients reduced: half of what an all-reduce moves."""
    travels = precision.weights if config.model.autocast == "no" else precision.products
    num_bytes = sizes.matrices * travels + (sizes.parameters - sizes.matrices) * precision.weights
    return num_bytes / (2 * device.all_reduce_gb_per_s * 1e9)


def optimize_seconds(config: Experiment, models: Models, load: Load, ranks: int, device: Device) -> Parts:
    """Forward and backward of every pass, a gradient's way through the ranks an update, clipping and AdamW.

    The head runs four products instead of three: its logits are computed again (trainers/logprobs.py). Gradient
    checkpointing runs the layers' forward once more. Under LoRA no product makes a frozen weight's gradient. Under
    FSDP2 weights are gathered in every forward and backward pass, and gradients reduced as model.reduce_gradients says.
    """
    precision = precision_of(config, device.on_cpu)
    rate = _rate(device, precision)
    again = 1 if config.model.gradient_checkpointing else 0
    parts = {"products": 0.0, "attention": 0.0, "head": 0.0, "between products": 0.0, "weights": 0.0}
    trunks = [models.policy, *([models.critic] if models.critic else [])]
    frozen = models.policy if models.adapters else None
    trained_bytes = models.trained_bytes(precision.weights)
    held_bytes = trained_bytes // (ranks if is_sharded(config) else 1)
    stream = device.memory_gb_per_s * 1e9
    for minibatch in load.minibatches:
        for step in minibatch:
            for sizes in trunks:
                products, attention = forward_flops(sizes, step)
                parts["products"] += ((2 if sizes is frozen else 3) + again) * products / rate
                parts["attention"] += (3.5 + again) * attention / (device.attention_tflops * 1e12)
                parts["between products"] += _between(sizes, step, precision, device, TRAVELS + 2 * again)
            if models.adapters:
                parts["products"] += 6.0 * models.adapters.parameters * step.tokens / rate
            parts["head"] += (3 if frozen else 4) * head_flops(models.policy, step) / rate
            # The weights are cast, their gradients made in the products' dtype, cast back, and added up.
            parts["weights"] += (5 if precision.casts else 3) * trained_bytes / stream
        parts["weights"] += (ADAM_BYTES + CLIP_BYTES) * held_bytes / stream
    if ranks > 1 and is_sharded(config):
        passes = sum(len(minibatch) for minibatch in load.minibatches)
        reductions = passes if config.model.reduce_gradients == "micro_batch" else len(load.minibatches)
        gathered = sum(gather_seconds(config, sizes, precision, device) for sizes in trunks)
        parts["gather"] = 2 * passes * gathered
        parts["reduce"] = reductions * WIDE * models.trained / (2 * device.all_reduce_gb_per_s * 1e9)
    elif ranks > 1:
        parts["all-reduce"] = len(load.minibatches) * trained_bytes / (device.all_reduce_gb_per_s * 1e9)
    return parts


def _between(sizes: ModelSizes, step: Pass, precision: Precision, device: Device, travels: int) -> float:
    """Of all that lies between the products: as many bytes as autograd keeps, so many times through memory."""
    return travels * sizes.layers * layer_bytes(sizes, step, precision) / (device.memory_gb_per_s * 1e9)


def _rate(device: Device, precision: Precision) -> float:
    return (device.bf16_tflops if precision.products == 2 else device.f32_tflops) * 1e12
