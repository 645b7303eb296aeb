"""A plan as a page of text, and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from scripts.planning.planner import Plan
from trainers.memory_plan import GIB
from trainers.step_time import bottleneck
from trainers.trainer_memory import is_sharded, loading_bytes

SHOWN_S = 0.005
"""Kinds of work that take less are left out of the text."""
OWNERS = {
    "trainer": ("policy", "critic", "reference", "optimizer", "gradients", "activations", "head", "whole weights"),
    "engine": ("engine weights", "KV cache", "engine step", "packing"),
    "process": ("framework", "heap", "kept of the update"),
}
"""Whose each part of the memory is, in the page's order."""
ABOUT = {
    "optimizer": "AdamW's two moments",
    "gradients": "at their most",
    "activations": "kept for the backward pass",
    "head": "its gradient, a block of logits",
    "whole weights": "gathered for a pass: embedding, head, a layer",
    "engine weights": "rollout.dtype",
    "engine step": "activations and logits of a step",
    "packing": "a layer, packed anew",
    "framework": "libraries, contexts, graphs",
    "heap": "kept free by the allocator",
    "kept of the update": "kept free by glibc after an update",
}
HELPS = {
    "host": "the device waits for scheduling and launching; fewer sequences a replica, so more replicas, take less",
    "products": "arithmetic; more devices, fewer tokens, or no model.gradient_checkpointing where memory allows",
    "between products": "memory traffic of norms, rotations, activations; it shrinks with the tokens alone",
    "attention": "it grows with the square of a sequence's length",
    "decode products": "each step reads all weights once for all its sequences; more of them at once share it",
    "keys and values": "each step reads the whole context; shorter responses, or more replicas",
    "prefill": "arithmetic of the prompts, and of contexts that are computed again",
    "all-reduce": "the ranks' link; fewer ranks a replica (generate), or fewer updates (optimize)",
    "gather": "sharded weights travel in every pass; larger micro_batch_tokens make fewer passes",
    "reduce": "sharded gradients travel with every micro-batch; model.reduce_gradients=update, if it fits",
    "head": "the vocabulary's products, four times; it shrinks with the response tokens alone",
}
"""What a kind of work is bound by, and what helps."""


def text_of(plan: Plan) -> str:
    """What is given, memory, what to change, cache, seconds and bottleneck."""
    return "\n\n".join([_given(plan), _memory(plan), _cache(plan), _seconds(plan)])


def json_of(plan: Plan, sources: dict[str, str]) -> dict[str, Any]:
    """Everything, constants and their sources too."""
    device = asdict(plan.device)
    phase, kind, share = bottleneck(plan.seconds)
    return {
        "model": asdict(plan.models.policy) | {"parameters": plan.models.policy.parameters},
        "trained_parameters": plan.models.trained,
        "ranks": plan.ranks,
        "tensor_parallel_size": plan.tp,
        "device": {name: {"value": value, "source": sources.get(name)} for name, value in device.items()},
        "memory_bytes": {moment: parts | {"all": plan.totals[moment]} for moment, parts in plan.memory.items()},
        "peak_bytes": plan.peak,
        "available_bytes": plan.available,
        "fits": plan.remedies is None,
        "remedies": plan.remedies or [],
        "kv_cache": {
            "bytes": plan.cache.bytes,
            "token_bytes": plan.cache.token_bytes,
            "blocks": plan.cache.blocks,
            "block_tokens": plan.cache.block,
            "sequences_that_fit": plan.fitting,
            "sequences_at_once": plan.at_once,
            "sequences": plan.sequences,
        },
        "micro_batch": asdict(plan.micro_batch),
        "seconds": {phase: parts | {"all": sum(parts.values())} for phase, parts in plan.seconds.items()},
        "step_seconds": plan.step_seconds,
        "bottleneck": {"phase": phase, "work": kind, "share": share},
    }


def _given(plan: Plan) -> str:
    config, models, hyper = plan.config, plan.models, plan.config.algorithm
    model, rollout = config.model, config.rollout
    trained = "all of them trained"
    if models.adapters:
        trained = f"{models.adapters.parameters / 1e6:.1f}M in adapters trained (lora.rank={models.adapters.rank})"
    lines = {"model": f"{models.policy.name}, {models.policy.parameters / 1e6:.1f}M parameters, {trained}"}
    if models.critic:
        lines["critic"] = f"{models.critic.name}, {models.critic.parameters / 1e6:.1f}M parameters, all of them trained"
    if models.reference:
        lines["reference"] = "the policy without its adapters" if models.adapters else "the first policy"
    lines["trainer"] = f"{model.dtype}, model.sharding={model.sharding}"
    if is_sharded(config):
        lines["trainer"] += f", model.reduce_gradients={model.reduce_gradients}"
    lines["trainer"] += ", gradient checkpointing" if model.gradient_checkpointing else ""
    replicas = plan.ranks // plan.tp
    lines["engine"] = f"{replicas} {'replica' if replicas == 1 else 'replicas'}, TP={plan.tp}, {rollout.dtype}"
    lines["engine"] += "" if plan.device.on_cpu else f", rollout.sleep={rollout.sleep}"
    certainty = "a data sheet's, not measured" if plan.device.predicted else "measured"
    lines["device"] = f"{plan.ranks} x {plan.device.name}; its constants are {certainty}"
    observed = f" and {plan.observed} of the environment's" if plan.observed else ""
    lines["a step"] = (
        f"{hyper.prompts_per_step} prompts of up to {plan.prompt} tokens, {config.sampling.n} "
        f"{'response' if config.sampling.n == 1 else 'responses'} each of {plan.response}{observed}"
    )
    lines["a pass"] = f"at most {plan.micro_batch.tokens} tokens on a rank, {hyper.epochs * hyper.minibatches} updates"
    if hyper.max_rounds > 1:
        lines["rounds"] = f"one; {hyper.section}.oversample may make it {hyper.max_rounds}, and generate as much longer"
    return "\n".join([f"PLAN of a run by {hyper.section}", *(f"  {name:<10} {told}" for name, told in lines.items())])


def _memory(plan: Plan) -> str:
    moments = list(plan.memory)
    lines = [f"{'MEMORY of a rank, GiB':<24}" + "".join(f"{moment:>16}" for moment in moments)]
    for owner, parts in OWNERS.items():
        rows = list(_rows(plan.memory, parts))
        lines += [f"  {owner}", *rows] if rows else []
    lines.append(f"{'  all':<24}" + "".join(f"{plan.totals[moment] / GIB:>16.2f}" for moment in moments))
    return "\n".join([*lines, _verdict(plan), *_host(plan)])


def _rows(memory: Mapping[str, Mapping[str, int]], names: tuple[str, ...]) -> Iterator[str]:
    """A line a part that is anywhere; nothing where there is none of it."""
    for name in names:
        sizes = [parts.get(name, 0) for parts in memory.values()]
        if max(sizes) >= 0.005 * GIB:
            cells = "".join(f"{size / GIB:>16.2f}" if size else f"{'-':>16}" for size in sizes)
            yield f"    {name:<20}{cells}   {ABOUT.get(name, '')}".rstrip()


def _verdict(plan: Plan) -> str:
    moment = max(plan.totals, key=plan.totals.__getitem__)
    peak, there = plan.peak / GIB, plan.available / GIB
    if plan.remedies is None:
        return f"  peak {peak:.2f} of {there:.1f} GiB, in {moment}: fits, {there - peak:.1f} GiB to spare"
    lines = [f"  peak {peak:.2f} of {there:.1f} GiB, in {moment}: DOES NOT FIT, {peak - there:.1f} GiB too much"]
    if not plan.remedies:
        return "\n".join([*lines, "  no setting makes it fit: take a smaller model, or devices with more memory"])
    told = "each of these lines makes it fit:" if len(plan.remedies) > 1 else "this makes it fit:"
    return "\n".join([*lines, f"  {told}", *(f"    {remedy}" for remedy in plan.remedies)])


def _host(plan: Plan) -> list[str]:
    """While it loads, ranks on GPUs have whole models in the memory of their machine."""
    if plan.device.on_cpu:
        return []
    size = loading_bytes(plan.models, 2 if plan.config.model.dtype == "bfloat16" else 4) / GIB
    return [f"  while it loads, each rank takes {size:.1f} GiB of its machine's own memory"]


def _cache(plan: Plan) -> str:
    cache = plan.cache
    waves = -(-plan.sequences // max(min(plan.at_once, plan.fitting), 1))
    limit = (
        "all of them at once" if waves == 1 else f"in about {waves} waves, by "
        f"{'rollout.max_num_seqs' if plan.at_once <= plan.fitting else 'the KV cache'}"
    )  # fmt: skip
    length = plan.prompt + plan.response + plan.observed
    return (
        f"KV CACHE of a rank: {cache.bytes / GIB:.2f} GiB, {cache.blocks} blocks of {cache.block} tokens at "
        f"{cache.token_bytes / 1024:.1f} KiB a token\n"
        f"  {plan.fitting} sequences of {length} tokens fit; a replica generates {plan.sequences}, {limit}"
    )


def _seconds(plan: Plan) -> str:
    lines = [f"{'TIME of a step':<18}{'s':>10}{'':>6}  of which"]
    for phase, parts in plan.seconds.items():
        kinds = sorted(((each, kind) for kind, each in parts.items() if each >= SHOWN_S), reverse=True)
        told = ", ".join(f"{kind} {each:.2f}" for each, kind in kinds)
        share = sum(parts.values()) / max(plan.step_seconds, 1e-12)
        lines.append(f"  {phase:<16}{sum(parts.values()):>10.2f}{share:>6.0%}  {told}".rstrip())
    lines.append(f"{'  all':<18}{plan.step_seconds:>10.2f}")
    phase, kind, share = bottleneck(plan.seconds)
    told = f"  bottleneck: {phase}, {kind} ({share:.0%} of the step)"
    return "\n".join([*lines, f"{told}: {HELPS[kind]}" if kind in HELPS else told])
