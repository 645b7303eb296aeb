"""A plan as text, and as JSON."""

from dataclasses import asdict
from typing import Any

from scripts.planning.planner import Plan
from trainers.memory_plan import GIB
from trainers.step_time import bottleneck

SHOWN_S = 0.005
"""Kinds of work that take less are left out of the text."""


def text_of(plan: Plan) -> str:
    """Memory, cache, seconds and bottleneck, readable."""
    return "\n\n".join([_head(plan), _memory(plan), _cache(plan), _seconds(plan)])


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


def _head(plan: Plan) -> str:
    config, policy = plan.config, plan.models.policy
    certainty = "predicted, not measured" if plan.device.predicted else "measured constants"
    return (
        f"{config.algorithm.section}, {policy.name}: {policy.parameters / 1e6:.1f}M parameters, "
        f"{plan.models.trained / 1e6:.1f}M of them trained in {config.model.dtype}; {plan.ranks} ranks, "
        f"TP={plan.tp}; {plan.device.name} ({certainty}).\n"
        f"A step: {config.algorithm.prompts_per_step} prompts of up to {plan.prompt} tokens, {config.sampling.n} "
        f"responses each of {plan.response}; the largest pass of a rank has {plan.micro_batch.tokens} tokens."
    )


def _memory(plan: Plan) -> str:
    moments = list(plan.memory)
    names = dict.fromkeys(name for parts in plan.memory.values() for name in parts)
    rows = [(name, [plan.memory[moment].get(name, 0) for moment in moments]) for name in names]
    rows = sorted((row for row in rows if any(row[1])), key=lambda row: -max(row[1]))
    rows.append(("all", [plan.totals[moment] for moment in moments]))
    lines = [f"{'GiB of a rank':<18}" + "".join(f"{moment:>16}" for moment in moments)]
    lines += [f"{name:<18}" + "".join(f"{value / GIB:>16.2f}" for value in values) for name, values in rows]
    verdict = "fits" if plan.remedies is None else "DOES NOT FIT"
    return "\n".join([*lines, f"peak {plan.peak / GIB:.2f} of {plan.available / GIB:.1f} GiB: {verdict}"])


def _cache(plan: Plan) -> str:
    cache = plan.cache
    waves = -(-plan.sequences // max(min(plan.at_once, plan.fitting), 1))
    limit = (
        "all of them at once" if waves == 1 else f"in about {waves} waves, by "
        f"{'rollout.max_num_seqs' if plan.at_once <= plan.fitting else 'the KV cache'}"
    )  # fmt: skip
    return (
        f"KV cache of a rank: {cache.bytes / GIB:.2f} GiB, {cache.blocks} blocks of {cache.block} tokens at "
        f"{cache.token_bytes / 1024:.1f} KiB a token; {plan.fitting} sequences of {plan.prompt + plan.response} tokens "
        f"fit. A replica generates {plan.sequences}, {limit}."
    )


def _seconds(plan: Plan) -> str:
    lines = [f"{'seconds of a step':<18}{'':>10}  of which"]
    for phase, parts in plan.seconds.items():
        kinds = sorted(((each, kind) for kind, each in parts.items() if each >= SHOWN_S), reverse=True)
        told = ", ".join(f"{kind} {each:.2f}" for each, kind in kinds)
        lines.append(f"{phase:<18}{sum(parts.values()):>10.2f}  {told}".rstrip())
    phase, kind, share = bottleneck(plan.seconds)
    lines.append(f"{'all':<18}{plan.step_seconds:>10.2f}  bottleneck: {phase}, {kind} ({share:.0%} of the step)")
    return "\n".join(lines)
