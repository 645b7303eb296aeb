"""A plan put together: the trainer's own functions cut a step into passes, trainers/ does the arithmetic."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil

from trainers.activations import Pass, passes, rank_batch
from trainers.config import Experiment, PPOConfig
from trainers.devices import Device
from trainers.memory_plan import CPU_KV_CACHE_GIB, GIB, Cache, kv_cache, plan_memory
from trainers.model_sizes import adapters_of, sizes_of
from trainers.step_time import Load, Parts, parts_of, plan_time
from trainers.trainer_memory import Models

LEAST_MICRO_BATCH = 256
"""Tokens; smaller ones are not proposed."""


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        ranks: of the job.
        tp: ranks of a replica of the engine.
        memory: bytes of a rank, by moment and part.
        available: bytes that a rank may use.
        prompt: tokens of the longest prompt.
        response: tokens that the policy samples of each response,
        observed: and those that an environment adds.
        sequences: of a replica in a step's generation,
        at_once: of them at most, by rollout.max_num_seqs,
        fitting: and by the KV cache, at their full length.
        micro_batch: the largest pass with gradient.
        seconds: of a step, by phase and kind of work.
        remedies: settings each of which makes it fit, or one line of several together; None if it fits.
    """

    config: Experiment
    device: Device
    models: Models
    ranks: int
    tp: int
    memory: dict[str, dict[str, int]]
    available: int
    cache: Cache
    prompt: int
    response: int
    observed: int
    sequences: int
    at_once: int
    fitting: int
    micro_batch: Pass
    seconds: dict[str, Parts]
    remedies: list[str] | None

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of a rank by moment."""
        return {moment: sum(parts.values()) for moment, parts in self.memory.items()}

    @property
    def peak(self) -> int:
        """Bytes of a rank, at most."""
        return max(self.totals.values())

    @property
    def step_seconds(self) -> float:
        return sum(sum(parts.values()) for parts in self.seconds.values())

    def advice(self) -> str:
        """Why it does not fit, and what to change."""
        moment = max(self.totals, key=self.totals.__getitem__)
        parts = self.memory[moment]
        largest = max(parts, key=parts.__getitem__)
        what = "; or ".join(f"set {remedy}" for remedy in self.remedies or ())
        return (
            f"a rank takes {self.peak / GIB:.1f} GiB ({moment}; the most of it {largest}, {parts[largest] / GIB:.1f} "
            f"GiB), and has {self.available / GIB:.1f}: {what or 'take a smaller model, or devices with more memory'}"
        )


def make_plan(
    config: Experiment,
    ranks: int,
    device: Device,
    prompts: Sequence[int],
    response: int | None = None,
    observed: int | None = None,
) -> Plan:
    """The plan, with what to change where it does not fit.

    Args:
        prompts: tokens of each prompt of a step, all ranks together.
        response: tokens that the policy samples of every response; None takes sampling.max_tokens.
        observed: tokens that an environment adds; None takes all that rollout.max_model_len leaves.

    Raises:
        ConfigError: if the model's config cannot be read, its layers are unknown, or the KV cache holds no sequence.
    """
    policy = sizes_of(config.model.path)
    critic = config.ppo.critic if isinstance(config, PPOConfig) else None
    models = Models(
        policy,
        sizes_of(critic).as_critic() if critic else None,
        value_head=isinstance(config, PPOConfig) and not critic,
        reference=bool(config.algorithm.kl_coef),
        adapters=adapters_of(config.model.path, config.lora),
    )
    plan = _plan(config, models, ranks, device, prompts, response, observed)
    if plan.peak <= plan.available:
        return plan

    def planned(changed: Experiment) -> Plan | None:
        try:
            return _plan(changed, models, ranks, device, prompts, response, observed)
        except ValueError:  # contradicts another key, or leaves no room for a sequence
            return None

    found: dict[str, str] = {}
    for text, changed in alternatives(config, device.on_cpu, ranks):
        if text.partition("=")[0] not in found and _fits(planned(changed)):  # a gentler value is enough
            found[text.partition("=")[0]] = text
    return replace(plan, remedies=[*found.values()] or _together(config, plan, planned))


def _fits(plan: Plan | None) -> bool:
    return plan is not None and plan.peak <= plan.available


def _together(config: Experiment, plan: Plan, planned: Callable[[Experiment], Plan | None]) -> list[str]:
    """Where no single change is enough: one line of several, as few as do; none if nothing is."""
    chosen: dict[str, str] = {}
    while not _fits(plan):
        for text, changed in sorted(alternatives(config, plan.device.on_cpu, plan.ranks), key=_cost):
            lower = planned(changed)
            if lower is not None and lower.peak < plan.peak:
                config, plan, chosen[text.partition("=")[0]] = changed, lower, text
                break
        else:
            return []
    return [" ".join(chosen.values())]


def _cost(alternative: tuple[str, Experiment]) -> int:
    """Where others are wanted too, what costs the least time comes first, and what changes the numbers last."""
    order = ("rollout.sleep", "model.gradient_checkpointing", "model.sharding", "model.reduce_gradients")
    key = alternative[0].partition("=")[0]
    return order.index(key) if key in order else len(order) + (key == "model.dtype")


def _plan(
    config: Experiment,
    models: Models,
    ranks: int,
    device: Device,
    prompts: Sequence[int],
    response: int | None,
    observed: int | None,
) -> Plan:
    hyper, n = config.algorithm, config.sampling.n
    tp = config.rollout.tensor_parallel_size or ranks
    response = response or config.sampling.max_tokens
    ordered = sorted(prompts, reverse=True)
    of_rank, of_replica = ordered[::ranks], ordered[:: ranks // tp]
    room = max(config.rollout.max_model_len - ordered[0] - response, 0) if config.environment.function else 0
    observed = room if observed is None else min(observed, room)
    batch = rank_batch(of_rank, n, response, observed)
    packed = not models.policy.windows
    minibatches = [
        passes(each, hyper.micro_batch_tokens, packed) for each in batch.minibatches(hyper.minibatches, hyper.epochs, 0)
    ]
    forward = passes(batch, 2 * hyper.micro_batch_tokens, packed)
    cache = kv_cache(config, models.policy, tp, device)
    fitting = cache.sequences(of_replica[0], response + observed, n)
    parts = parts_of(response, config.partial.tokens_per_step, config.partial.max_age)
    load = Load(of_replica, n, response, len(of_rank) * n, forward, minibatches, observed, parts)
    at_once = min(load.sequences, config.rollout.max_num_seqs)
    running = min(at_once, fitting)
    largest = max(minibatches, key=lambda each: (max(step.tokens for step in each), len(each)))
    return Plan(
        config=config,
        device=device,
        models=models,
        ranks=ranks,
        tp=tp,
        memory=plan_memory(
            config, models, ranks, tp, cache, largest, running, of_replica[0], response + observed, device
        ),
        available=_available(device, ranks),
        cache=cache,
        prompt=of_replica[0],
        response=response,
        observed=observed,
        sequences=load.sequences,
        at_once=at_once,
        fitting=fitting,
        micro_batch=max(largest, key=lambda step: step.tokens),
        seconds=plan_time(config, models, load, tp, ranks, device),
        remedies=None,
    )


def _available(device: Device, ranks: int) -> int:
    if device.memory_gib is not None:
        return int(device.memory_gib * GIB)
    return psutil.virtual_memory().total // min(ranks, len(os.sched_getaffinity(0)))


def alternatives(config: Experiment, on_cpu: bool, ranks: int) -> Iterator[tuple[str, Experiment]]:
    """Configs that take less memory, each with what is set; the gentlest first."""
    hyper, rollout = config.algorithm, config.rollout
    tokens = hyper.micro_batch_tokens // 2
    while tokens >= LEAST_MICRO_BATCH:
        yield f"{hyper.section}.micro_batch_tokens={tokens}", _with(config, hyper.section, micro_batch_tokens=tokens)
        tokens //= 2
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", _with(config, "model", gradient_checkpointing=True)
    if not on_cpu:
        for sleep in ("kv_cache", "all"):
            yield f"rollout.sleep={sleep}", _with(config, "rollout", sleep=sleep)
    if ranks > 1:
        yield "model.sharding=fsdp2", _with(config, "model", sharding="fsdp2")
    if config.model.reduce_gradients == "update":
        yield "model.reduce_gradients=micro_batch", _with(config, "model", reduce_gradients="micro_batch")
    if on_cpu or rollout.kv_cache_gib is not None:
        half = (rollout.kv_cache_gib or CPU_KV_CACHE_GIB) / 2
        yield f"rollout.kv_cache_gib={half:g}", _with(config, "rollout", kv_cache_gib=half)
    else:
        share = rollout.gpu_memory_utilization
        while (share := round(share - 0.05, 2)) >= 0.05:
            yield f"rollout.gpu_memory_utilization={share:g}", _with(config, "rollout", gpu_memory_utilization=share)
    if config.model.dtype == "float32" and config.lora.rank is not None and getattr(hyper, "critic", None) is None:
        yield "model.dtype=bfloat16", _with(config, "model", dtype="bfloat16")


def _with(config: Experiment, section: str, **changes: Any) -> Experiment:
    return replace(config, **{section: replace(getattr(config, section), **changes)})
