"""Runs in every rank: weight syncs by a plan, plans that are wrong, and syncs that leave something out.

torchrun --nproc_per_node=2 sync_plan_worker.py MODEL OUT DTYPE
"""

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from transformers import AutoModelForCausalLM

import rollout.backend.planned_sync as planned_sync
import rollout.backend.shard_exchange as shard_exchange
import rollout.backend.weight_sync as weight_sync
from rollout import RolloutConfig, RolloutEngine, StaleWeights
from rollout.backend.planned_sync import PlannedSync
from rollout.backend.shard_exchange import local_part
from rollout.backend.sync_plan import NoPlan
from rollout.backend.weight_sync import CHECKED_LAYERS, WeightSync, fingerprint
from rollout.backend.worker import reload_policy_weights
from rollout.weights import named_weights


def changed(policy: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.0 + 0.3 * torch.randn(parameter.shape, generator=generator))


def changed_shards(policy: torch.nn.Module, seed: int) -> None:
    """Each rank changes what it holds, in its own way."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            part = local_part(parameter)
            part.mul_(1.0 + 0.3 * torch.rand(part.shape, generator=generator))


def by_plan_and_by_reload(engine: RolloutEngine, policy: torch.nn.Module) -> dict[str, Any]:
    """Two policies, each by either way: what every layer then holds."""
    sync = engine._core.executor._sync()
    worker, layers = sync._worker, sync._plan.layers
    found = []
    for seed in (1, 2):
        changed(policy, seed)
        planned = engine.sync_weights(policy, seed).planned
        by_plan = fingerprint(layers)
        engine._core.executor.thread.run(reload_policy_weights, worker, policy.named_parameters())
        found.append({"planned": planned, "equal": by_plan == fingerprint(layers), "layers": len(layers)})
    return {"found": found}


def of_a_sharded_policy(engine: RolloutEngine, model: str, policy: torch.nn.Module) -> dict[str, Any]:
    """The same weights in FSDP2's shards: does the engine hold the same?"""
    engine.sync_weights(policy, 4)
    expected = fingerprint(engine._core.executor.sync_layers())
    sharded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sharded.load_state_dict(policy.state_dict())
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    engine.sync_weights(policy_of_zeros(model), 5)
    planned = engine.sync_weights(sharded, 6).planned
    engine.check_weights(sharded)
    return {"planned": planned, "equal": fingerprint(engine._core.executor.sync_layers()) == expected}


def rows(policy: torch.nn.Module) -> None:
    fully_shard(policy)


def some_plain(policy: torch.nn.Module) -> None:
    """The embedding, the head and the last norm stay plain."""
    for layer in policy.model.layers:
        fully_shard(layer)


def columns(policy: torch.nn.Module) -> None:
    fully_shard(policy, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))


def with_partial_sums(policy: torch.nn.Module) -> None:
    """One parameter is a sum over the ranks, which no rank holds a box of."""
    fully_shard(policy.model.layers[0])
    mesh = init_device_mesh("cpu", (2,))
    norm = policy.model.layers[1].input_layernorm
    norm.weight = torch.nn.Parameter(DTensor.from_local(norm.weight.detach() / 2, mesh, [Partial()]))


def of_layouts(engine: RolloutEngine, model: str, policy: torch.nn.Module) -> dict[str, Any]:
    """Policies in other layouts: what the engine holds after their first sync and after their second.

    And what travelled in that, and how many parameters were gathered whole.
    """
    sync = engine._core.executor._sync()
    gathered: list[tuple] = []
    full_tensor = DTensor.full_tensor

    def counted(self: DTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        gathered.append(tuple(self.shape))
        return full_tensor(self, *args, **kwargs)

    found = {}
    for shard in (rows, some_plain, columns, with_partial_sums):
        equal = []
        for seed in (21, 22):
            changed(policy, seed)
            engine.sync_weights(policy, seed)
            expected = fingerprint(sync.layers)
            sharded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            sharded.load_state_dict(policy.state_dict())
            shard(sharded)
            engine.sync_weights(policy_of_zeros(model), seed)
            routes, before = len(sync._plan._routes), sync._plan.channel.received_bytes
            DTensor.full_tensor = counted
            gathered.clear()
            planned = engine.sync_weights(sharded, seed).planned
            DTensor.full_tensor = full_tensor
            equal.append(planned and fingerprint(sync.layers) == expected)
            received = sync._plan.channel.received_bytes - before
            new_routes = len(sync._plan._routes) - routes
            engine.check_weights(sharded)
        found[shard.__name__] = {
            "equal": equal,
            "gathered": len(gathered),
            "new_routes": new_routes,
            "received": received,
            "whole": sum(parameter.numel() for parameter in policy.parameters()) * 2,
            "memory": sync._plan.channel.memory_bytes,
        }
    found["left_out"] = what_a_sync_left_out(engine, policy, in_shards=sharded)
    return found


def lost_pieces(engine: RolloutEngine, model: str) -> dict[str, Any]:
    """An exchange that loses a piece, or mixes two up: a first sync that goes by it is noticed."""
    make_buckets, inside = shard_exchange.make_buckets, shard_exchange.inside

    def loses_one(*args: Any) -> list:
        buckets = make_buckets(*args)
        return [*buckets[:-1], buckets[-1][:-1]] if buckets else []

    def is_off(box: Any, outer: Any) -> Any:
        """Every second half of something is read, or written, at its start."""
        return tuple(slice(0, side.stop - side.start) for side in box)

    found = {}
    for name, change in (("make_buckets", loses_one), ("inside", is_off)):
        sharded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        columns(sharded)
        engine._core.executor._weight_sync = WeightSync(engine._core.executor._sync()._worker, reads_head=True)
        setattr(shard_exchange, name, change)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            planned = engine.sync_weights(sharded, 30).planned
        shard_exchange.make_buckets, shard_exchange.inside = make_buckets, inside
        found[name] = {"planned": planned, "said": [str(each.message) for each in caught]}
    return found


def policy_of_zeros(model: str) -> torch.nn.Module:
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    for parameter in policy.parameters():
        parameter.zero_()
    return policy


def what_a_sync_left_out(
    engine: RolloutEngine, policy: torch.nn.Module, in_shards: torch.nn.Module | None = None
) -> dict[str, Any]:
    """Leave out one layer after the other: is it named at once by a full check, and soon by the syncs' own?

    All ranks leave out the same, and find it in the same sync, unless they hold other parts of the vocabulary.
    """
    sync = engine._core.executor._sync()
    plan = sync._plan
    weights = dict(named_weights(in_shards or policy))
    found: dict[str, Any] = {"named": [], "syncs": [], "turns": -(-len(plan.layers) // CHECKED_LAYERS)}
    for number, layer in enumerate(plan.layers):
        if number % 3:
            continue
        changed(policy, 10 + number)
        if in_shards is not None:
            changed_shards(in_shards, 10 + number)
        all_layers, plan.layers = plan.layers, [each for each in plan.layers if each is not layer]
        plan.load(weights)
        plan.layers = all_layers
        said = told(lambda: engine._core.executor.check_policy_weights(weights))
        found["named"].append(any(copy.source in said for copy in layer.copies))
        start, needed = sync._next_check, 0
        while True:
            needed += 1
            try:
                start = plan.check(weights, start, CHECKED_LAYERS)
            except StaleWeights:
                break
        found["syncs"].append(needed)
        plan.load(weights)
    plan.check(weights, 0, None)
    return found


def told(call) -> str:
    try:
        call()
    except StaleWeights as error:
        return str(error)
    return "nothing"


def wrong_plans(engine: RolloutEngine, policy: torch.nn.Module) -> dict[str, Any]:
    """Plans that mix up two copies, or miss one, and no plan at all: each is noticed, and the sync goes on without."""
    make_plan = weight_sync.make_plan

    def k_for_v(*args):
        layers = make_plan(*args)
        layer = next(each for each in layers if len(each.copies) == 3)
        layer.copies[2] = replace(layer.copies[2], source=layer.copies[1].source)
        return layers

    def without_a_norm(*args):
        layers = make_plan(*args)
        layer = next(each for each in layers if "norm" in each.copies[0].source)
        layer.copies.clear()
        return layers

    def none(*args):
        if engine.world.rank == 1:
            raise NoPlan("a loader of weight does more than copy a rectangle")
        return make_plan(*args)

    found = {}
    for make in (k_for_v, without_a_norm, none):
        weight_sync.make_plan = make
        sync = engine._core.executor._weight_sync = WeightSync(engine._core.executor._sync()._worker, reads_head=True)
        changed(policy, 99)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = engine.sync_weights(policy, 5)
        weight_sync.make_plan = make_plan
        # The reload did its work: a right plan agrees with every layer.
        layers = make_plan(sync._model, {name: each.shape for name, each in policy.named_parameters()})
        held = PlannedSync(layers, sync._model, True)
        try:
            held.check({name: each.detach() for name, each in policy.named_parameters()}, 0, None)
            right = True
        except StaleWeights:
            right = False
        found[make.__name__] = {
            "planned": report.planned,
            "said": [str(each.message) for each in caught],
            "right": right,
        }
    return found


def flipped_bits(engine: RolloutEngine, policy: torch.nn.Module) -> list[dict[str, Any]]:
    """The last bit of one element of each parameter of the engine, anywhere in it: is the policy's parameter named?

    What oneDNN has packed cannot be reached; there the bit is another one just before the layer is packed.
    """
    plan, real_pack = engine._core.executor._sync()._plan, planned_sync.pack
    weights = dict(named_weights(policy))
    rng = np.random.default_rng(engine.world.rank)
    found = []
    for layer, parameters in zip(plan.layers, plan._filled, strict=True):
        for each in parameters:
            copy = each.copies[rng.integers(len(each.copies))]
            place = tuple(int(rng.integers(side.start, side.stop)) for side in copy.target_box)

            def flip_and_pack(module, layer=layer, each=each, place=place):
                if module is layer.module:
                    flip(module._parameters[each.target].data, place)
                real_pack(module)

            if each.packed:
                planned_sync.pack = flip_and_pack
                plan.load(weights)
                planned_sync.pack = real_pack
            else:
                flip(getattr(layer.module, each.target).data, place)
            said = told(lambda: engine._core.executor.check_policy_weights(weights))
            found.append({"packed": each.packed, "named": copy.source in said, "place": [copy.source, *place, said]})
            plan.load(weights)
    plan.check(weights, 0, None)
    return found


@torch.inference_mode()
def flip(held: torch.Tensor, place: tuple[int, ...]) -> None:
    held.view(torch.int16 if held.itemsize == 2 else torch.int32)[place] ^= 1


def a_sync_that_forgets(engine: RolloutEngine, policy: torch.nn.Module) -> dict[str, Any]:
    """From now on one layer gets nothing: which sync says so, and what the engine does then."""
    plan = engine._core.executor._sync()._plan
    forgotten, load = plan.layers[3], plan.load

    def forgets(weights: Any) -> None:
        layers, plan.layers = plan.layers, [each for each in plan.layers if each is not forgotten]
        load(weights)
        plan.layers = layers

    plan.load = forgets
    for number in range(100):
        changed(policy, 200 + number)
        try:
            engine.sync_weights(policy, 200 + number)
        except StaleWeights as error:
            named = any(copy.source in str(error) for copy in forgotten.copies)
            try:
                engine.generate([[5, 6, 7]])
            except RuntimeError as refused:
                return {"syncs": number + 1, "named": named, "then": str(refused)}
    return {"syncs": 100, "named": False, "then": "nothing"}


def main() -> None:
    model, out, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    config = RolloutConfig(dtype=dtype, max_model_len=128, kv_cache_gib=0.25, block_size=32, enforce_eager=True)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy.requires_grad_(False)
    with RolloutEngine(model, config) as engine:
        results: dict[str, Any] = {"too_early": ""}
        try:
            engine.check_weights(policy)
        except RuntimeError as error:
            results["too_early"] = str(error)
        beats: list[None] = []
        beat = weight_sync.beat
        weight_sync.beat = planned_sync.beat = lambda: beats.append(None)
        results["first"] = engine.sync_weights(policy, 0).planned
        weight_sync.beat = planned_sync.beat = beat
        results["beats"] = len(beats)
        results["equal"] = by_plan_and_by_reload(engine, policy)
        engine.sync_weights(policy, 3)
        engine.check_weights(policy)
        results["sharded"] = of_a_sharded_policy(engine, model, policy)
        results["left_out"] = what_a_sync_left_out(engine, policy)
        results["flipped"] = flipped_bits(engine, policy)
        results["layouts"] = of_layouts(engine, model, policy)
        results["lost"] = lost_pieces(engine, model)
        results["wrong"] = wrong_plans(engine, policy)
    with RolloutEngine(model, config) as engine:
        engine.sync_weights(policy, 0)
        results["forgets"] = a_sync_that_forgets(engine, policy)
        # Both ranks failed, and their watches would end them: what a test wants to know is known.
        (out / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
