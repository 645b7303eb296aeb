"""A weight sync as copies by a plan: from a policy's parameters, or the shards of them, into this rank's layers.

Layers that oneDNN holds packed are filled in buffers and packed again. What the engine then holds can be compared with
what was sent, some lines of some layers or everything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from vllm.distributed.parallel_state import get_world_group
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
from vllm.platforms import current_platform

from rollout.adapters import LoraWeight, Weight
from rollout.backend.shard_exchange import (
    BUCKET_BYTES,
    Channel,
    Exchange,
    Holders,
    Need,
    find_holders,
    held_box,
    local_part,
)
from rollout.backend.sync_plan import Layer
from rollout.backend.transpose import transposed_buffer
from rollout.backend.weight_check import PROBES, Filled, differs, filled, strips
from rollout.failure import beat
from rollout.weights import StaleWeights

Weights = Mapping[str, Weight]

Layout = tuple[tuple, ...]
"""Names and shapes of a policy's parameters, and how each is spread over the ranks."""

MEMORY_ALIGNMENT = 64
"""Bytes; as torch's own memory, so that a product in it is computed in the same way."""


def layout_of(weights: Weights) -> Layout:
    """By parameter: name, shape, and of a sharded one the ranks' mesh and what is done along each of its dimensions."""
    return tuple((name, weight.shape, spread(weight)) for name, weight in weights.items())


def spread(weight: Weight) -> Any:
    """How a parameter lies on the ranks; None where each has it whole. One under adapters is merged whole on each."""
    if isinstance(weight, LoraWeight):
        return "merged"
    return (weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else None


@dataclass(frozen=True)
class Route:
    """How a policy of one layout reaches this rank.

    Attributes:
        holders: of the parameters that are sent in pieces; the others are there whole, or are gathered.
        filled: by rank, layer and parameter; of the other ranks only where something is sent.
        exchange: fills this rank's layers, a layer in a step.
    """

    holders: Holders
    filled: list[list[list[Filled]]]
    exchange: Exchange


class PlannedSync:
    """Copies by a plan. A packed layer (oneDNN on the CPU) is filled in a buffer, and packed again.

    A sharded policy's parameters go in pieces from the ranks that hold them to those that need them.

    Args:
        layers: of `make_plan`.
        model: the engine's.
        reads_head: as in WeightSync.
        bucket_bytes: that a rank sends at a time, and receives at a time.
    """

    def __init__(self, layers: list[Layer], model: Module, reads_head: bool, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.layers = layers
        self._model, self._reads_head = model, reads_head
        self._device = next(model.parameters()).device
        self._filled = [filled(layer) for layer in layers]
        self._steps = {id(layer): step for step, layer in enumerate(layers)}
        self._packed: dict[int, dict[str, Parameter]] = {}
        self._targets = self._make_targets(layers)
        self.drop_packed_copies()
        group = get_world_group()
        on_cpu = self._device.type == "cpu"
        self.channel = Channel(group.cpu_group if on_cpu else group.device_group, self._device, bucket_bytes)
        self._routes: dict[Layout, Route] = {}

    @torch.inference_mode()
    def load(self, weights: Weights) -> None:
        """Replace the weights, all of them. For a sharded policy all ranks do it together."""
        route = self._route(weights)
        whole = Whole()
        run = route.exchange.run(parts(weights, whole))
        for layer in self.layers:
            beat()
            step = self._steps[id(layer)]
            gather(layer, weights, route.holders, whole)
            run.fill(step)
            if buffers := self._packed[step]:
                layer.module._parameters.update(buffers)
                pack(layer.module)
        for module in self._packed_again:
            pack(module)

    def _make_targets(self, layers: list[Layer]) -> list[torch.Tensor]:
        """What each copy fills, cut once; layers that are packed take turns in buffers, one for each shape."""
        buffers: dict[torch.Size, Parameter] = {}
        targets = []
        for step, (layer, parameters) in enumerate(zip(layers, self._filled, strict=True)):
            packed = self._packed[step] = {}
            for each in parameters:
                parameter = getattr(layer.module, each.target)
                if each.packed:
                    if each.shape not in buffers:
                        buffer = buffer_to_pack(each.shape, each.dtype)
                        buffers[each.shape] = Parameter(buffer, requires_grad=False)
                    parameter = packed[each.target] = buffers[each.shape]
                targets += [parameter.data[copy.target_box] for copy in each.copies]
        return targets

    def _route(self, weights: Weights) -> Route:
        """Of this layout: agreed upon once, by all ranks together, and kept. A plain policy's takes no word."""
        layout = layout_of(weights)
        if layout not in self._routes:
            holders: Holders = {}
            of_ranks: list[list[list[Filled]]] = [[[] for _ in self._filled]] * self.channel.size
            of_ranks[self.channel.rank] = self._filled
            if any(isinstance(weight, DTensor) for weight in weights.values()):
                held = {
                    name: None if isinstance(weight, LoraWeight) else held_box(weight)
                    for name, weight in weights.items()
                }
                everyones = self.channel.tell((held, self._filled))
                holders = find_holders(
                    [each[0] for each in everyones], {name: each.shape for name, each in weights.items()}
                )
                of_ranks = [each[1] for each in everyones]
            needs = [needed(of_rank) for of_rank in of_ranks]
            self._routes[layout] = Route(holders, of_ranks, Exchange(holders, needs, self._targets, self.channel))
        return self._routes[layout]

    @torch.inference_mode()
    def check(self, weights: Weights, start: int, count: int | None) -> int:
        """Compare layers with what was sent, in turn; returns where the next check starts.

        For a sharded policy all ranks do it together.

        Args:
            start: the first layer, counted on beyond the last one.
            count: of layers, of each of which some rows are compared; None compares all of all, and gathers sharded
                parameters whole, those of a layer at a time.

        Raises:
            StaleWeights: names the parameter.
        """
        turns = range(start, start + (len(self.layers) if count is None else count))
        firsts = {turn: None if count is None else turn * PROBES for turn in turns}
        sent = self._whole(weights, turns) if count is None else self._lines(weights, firsts)
        for turn, first in firsts.items():
            beat()
            step = turn % len(self.layers)
            for each in self._filled[step]:
                policy = [next(sent) for _ in strips(each, first)]
                differing = differs(self.layers[step], each, first, policy)
                if differing is not None:
                    kind = type(self.layers[step].module).__name__
                    raise StaleWeights(
                        f"after the sync the engine's {each.target} of {kind} is not what the policy sent as "
                        f"{differing}: nothing generated with it can be trusted; build a new engine"
                    )
        return turns.stop

    def _whole(self, weights: Weights, turns: range) -> Iterator[torch.Tensor]:
        """What the policy has in each strip of whole layers; not by a sync's way, which may have gone wrong."""
        whole = Whole()
        for step in turns:
            layer = self.layers[step % len(self.layers)]
            gather(layer, weights, {}, whole)
            for each in self._filled[step % len(self.layers)]:
                yield from (whole[strip.source][strip.source_box] for strip in strips(each, None))

    def _lines(self, weights: Weights, firsts: Mapping[int, int | None]) -> Iterator[torch.Tensor]:
        """What the policy has in each strip of some lines; no more of it travels."""
        route = self._route(weights)
        steps = [turn % len(self.layers) for turn in firsts]
        needs = [needed([of_rank[step] for step in steps], [*firsts.values()]) for of_rank in route.filled]
        sent = [
            torch.empty([side.stop - side.start for side in need.box], dtype=need.dtype, device=self._device)
            for need in needs[self.channel.rank]
        ]
        whole = Whole()
        run = Exchange(route.holders, needs, sent, self.channel).run(parts(weights, whole))
        for number, step in enumerate(steps):
            gather(self.layers[step], weights, route.holders, whole)
            run.fill(number)
        return iter(sent)

    def drop_packed_copies(self) -> None:
        """Of layers that keep their weight beside a packed copy of it: keep those whose copy somebody reads.

        vLLM packs the embedding and the output head too. Nobody multiplies by the embedding; where the sampler reads
        the head's weight itself, nobody multiplies by that copy either, and packing it takes as long as ten layers.
        A reload packs them again.
        """
        self._packed_again: list[Module] = []
        written = {getattr(layer.module, target).data_ptr() for layer in self.layers for target in layer.shapes}
        for name, module in self._model.named_modules():
            weight = getattr(module, "weight", None)
            if not hasattr(module, "cpu_linear") or weight is None or not weight.numel():
                continue
            if weight.data_ptr() in written:
                is_head = name.split(".")[-1] == "lm_head"
                if is_head and not self._reads_head:
                    self._packed_again.append(module)
                else:
                    module.cpu_linear = torch.nn.functional.linear


def needed(layers: Sequence[Sequence[Filled]], firsts: Sequence[int | None] | None = None) -> list[Need]:
    """What a rank needs for some lines of layers, a layer in a step; all of them without `firsts`."""
    firsts = [None] * len(layers) if firsts is None else firsts
    return [
        Need(step, strip.source, strip.source_box, each.dtype)
        for step, (layer, first) in enumerate(zip(layers, firsts, strict=True))
        for each in layer
        for strip in strips(each, first)
    ]


def parts(weights: Weights, whole: Mapping[str, torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """This rank's part of each parameter: that in `whole`, where it is there, or else the shard."""

    def part(name: str) -> torch.Tensor:
        if name in whole:
            return whole[name]
        weight = weights[name]
        assert isinstance(weight, torch.Tensor), "what adapters change has no holders"
        return local_part(weight)

    return part


class Whole(dict[str, torch.Tensor]):
    """What fills one layer and is there whole, by name; `gather` replaces it by the next layer's.

    What is merged takes the same memory for each layer: new pages would cost more than the merge.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def merge(self, weights: Mapping[str, LoraWeight]) -> None:
        """Put matrices under adapters in, each in the dtype that it is computed in."""
        sizes = [prod(weight.shape) * weight.dtype.itemsize for weight in weights.values()]
        starts = [0, *accumulate(-(-size // MEMORY_ALIGNMENT) * MEMORY_ALIGNMENT for size in sizes)]
        if self._memory.numel() < starts[-1]:
            device = next(iter(weights.values())).base.device
            self._memory = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        for (name, weight), start, size in zip(weights.items(), starts, sizes, strict=False):
            self[name] = weight.merged(self._memory[start : start + size].view(weight.dtype))


def gather(layer: Layer, weights: Weights, holders: Holders, whole: Whole) -> None:
    """Put into `whole` what a layer is filled from and is not sent in pieces, and nothing else.

    Sharded ones are gathered, which all ranks do together; in the engine's dtype, so that no more travels than the
    engine takes. Those under adapters are merged: what that needs beside the policy is one layer's memory.
    """
    whole.clear()
    dtypes = {getattr(layer.module, target).dtype for target in layer.shapes}
    adapted = {}
    for name in layer.sources:
        weight = weights[name]
        if isinstance(weight, LoraWeight):
            adapted[name] = weight
        elif name not in holders:
            whole[name] = whole_weight(weight, *(dtypes if len(dtypes) == 1 else [weight.dtype]))
    whole.merge(adapted)


def whole_weight(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A sharded parameter gathered, in its global shape and `dtype`; one under adapters merged, any other as it is."""
    if isinstance(weight, LoraWeight):
        return weight.merged()
    if isinstance(weight, DTensor):
        weight = weight.to(dtype)
        assert isinstance(weight, DTensor)
        return weight.full_tensor()
    return weight


def buffer_to_pack(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, (outputs, inputs), in the layout that they are packed from fastest; by vLLM's choice of who packs."""
    by_onednn = len(shape) == 2 and not current_platform.is_zen_cpu() and not check_cpu_sgl_kernel(*shape, dtype)
    return transposed_buffer(shape, dtype) if by_onednn else torch.zeros(shape, dtype=dtype)


def pack(module: Any) -> None:
    """Have vLLM pack the layer's weight."""
    module.quant_method.process_weights_after_loading(module)
