"""The policy's weights into the worker's: copies by a plan, or vLLM's reload where there is none.

The first sync goes through vLLM's reload and derives the plan. Before the plan is trusted it has to undo another load
exactly: weights of the other sign go in by the plan, then the policy's, and every layer must be, bit for bit, what the
reload had made of it.
"""

import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.v1.worker.worker_base import WorkerBase

from rollout.backend.sync_plan import Box, Layer, NoPlan, make_plan
from rollout.backend.worker import load_policy_weights
from rollout.weights import StaleWeights

Weights = Mapping[str, torch.Tensor]

PROBES = 4
"""Rows that a packed layer multiplies to show what it holds; and rows of a large parameter that a check looks at."""
CHECKED_LAYERS = 4
"""Of a sync, in turn: within a twentieth of its time (docs/results.md)."""
ZEROS = 0
"""The fingerprint of a layer of zeros, whose sign cannot be changed."""


@dataclass(frozen=True)
class Loaded:
    """What one sync did.

    Attributes:
        num_bytes: of the policy's parameters that were read.
        planned: True if they went by the plan; False if vLLM reloaded them.
    """

    num_bytes: int
    planned: bool


class WeightSync:
    """A worker's weights, and how to replace them. On the execute thread.

    Args:
        worker: vLLM's.
        reads_head: True if the sampler reads the output head's weight as it is, and nobody its packed copy.
    """

    def __init__(self, worker: WorkerBase, reads_head: bool) -> None:
        self._worker = worker
        self._model: Module = worker.model_runner.get_model()
        self._reads_head = reads_head
        self._plan: PlannedSync | None = None
        self._shapes: dict[str, torch.Size] = {}
        self._next_check = 0

    @property
    def layers(self) -> list[Layer]:
        """Of the plan; none without one."""
        return self._plan.layers if self._plan is not None else []

    def load(self, weights: Weights) -> Loaded:
        """Replace the weights, and look at some of them.

        Args:
            weights: of the policy, by their checkpoint names.

        Raises:
            ValueError: if the policy lacks a parameter that the engine has.
            StaleWeights: if the engine holds something else afterwards.
        """
        shapes = {name: weight.shape for name, weight in weights.items()}
        if self._plan is not None and shapes == self._shapes:
            self._plan.load(weights)
        else:
            load_policy_weights(self._worker, self._whole(weights))
            if shapes != self._shapes:
                self._shapes = shapes
                self._plan = self._proven_plan(weights)
        if self._plan is not None:
            self._next_check = self._plan.check(weights, self._next_check, CHECKED_LAYERS)
        num_bytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
        return Loaded(num_bytes, self._plan is not None)

    def check(self, weights: Weights) -> None:
        """Compare everything that the engine holds with the policy.

        Raises:
            StaleWeights: names the first parameter that differs.
        """
        assert self._plan is not None, "the engine asks only where there are layers"
        self._plan.check(weights, 0, None)

    def _whole(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter whole, one at a time; for vLLM's reload, which takes them as they come."""
        for name, weight in weights.items():
            yield name, whole_weight(weight, weight.dtype)

    def _proven_plan(self, weights: Weights) -> "PlannedSync | None":
        """The plan, if every rank has one that is right: a reload of a sharded policy takes all of them."""
        plan, reason = None, None
        with set_current_vllm_config(self._worker.vllm_config):
            try:
                plan = PlannedSync(make_plan(self._model, self._shapes), self._model, self._reads_head)
            except NoPlan as error:
                reason = str(error)
            reason = first_of_ranks(reason)
            if reason is None:
                assert plan is not None
                reason = first_of_ranks(disproof(plan, weights))
            if reason is None:
                return plan
            load_policy_weights(self._worker, self._whole(weights))  # whatever a failed proof has left there
        warnings.warn(f"weights are synced through vLLM's reload, which is slower: {reason}", stacklevel=2)
        return None


def first_of_ranks(reason: str | None) -> str | None:
    """The reason of the first rank of the job that has one."""
    group = get_world_group().cpu_group
    everyones: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, reason, group=group)
    return next((each for each in everyones if each is not None), None)


class PlannedSync:
    """Copies by a plan. A packed layer (oneDNN on the CPU) is filled in a buffer, and packed again.

    Args:
        layers: of `make_plan`.
        model: the engine's.
        reads_head: as in WeightSync.
    """

    def __init__(self, layers: list[Layer], model: Module, reads_head: bool) -> None:
        self.layers = layers
        self._dtype = next(model.parameters()).dtype
        buffers: dict[torch.Size, Parameter] = {}
        self._moves = {id(layer): self._moves_of(layer, buffers) for layer in layers}
        self._packed_again = self._drop_packed_copies(model, reads_head)

    @torch.inference_mode()
    def load(self, weights: Weights) -> None:
        """Replace the weights, all of them; of a sharded policy one layer at a time is whole."""
        for layer in self.layers:
            moves, buffers = self._moves[id(layer)]
            whole = whole_weights(layer, weights, self._dtype)
            for target, source, box in moves:
                target.copy_(whole[source][box])
            if buffers:
                layer.module._parameters.update(buffers)
                pack(layer.module)
        for module in self._packed_again:
            pack(module)

    def _moves_of(
        self, layer: Layer, buffers: dict[torch.Size, Parameter]
    ) -> tuple[list[tuple[torch.Tensor, str, Box]], dict[str, Parameter]]:
        """What goes where, cut once; and the buffers that take the place of parameters which are packed."""
        moves, packed = [], {}
        for target, shape in layer.shapes.items():
            parameter = getattr(layer.module, target)
            if parameter.shape != shape:
                if shape not in buffers:
                    buffers[shape] = Parameter(torch.zeros(shape, dtype=self._dtype), requires_grad=False)
                parameter = packed[target] = buffers[shape]
            for copy in layer.copies_to(target):
                moves.append((parameter.data[copy.target_box], copy.source, copy.source_box))
        return moves, packed

    @torch.inference_mode()
    def check(self, weights: Weights, start: int, count: int | None) -> int:
        """Compare layers with what was sent, in turn; returns where the next check starts.

        Args:
            start: the first layer, counted on beyond the last one.
            count: of layers, of each of which some rows are compared; None compares all of all.

        Raises:
            StaleWeights: names the parameter.
        """
        for turn in range(start, start + (len(self.layers) if count is None else count)):
            layer = self.layers[turn % len(self.layers)]
            whole = whole_weights(layer, weights, self._dtype)
            for target, shape in layer.shapes.items():
                first = None if count is None else turn * PROBES
                differing = differs(layer, target, shape, whole, first)
                if differing is not None:
                    raise StaleWeights(
                        f"after the sync the engine's {target} of {type(layer.module).__name__} is not what the policy "
                        f"sent as {differing}: nothing generated with it can be trusted; build a new engine"
                    )
        return turn + 1

    def _drop_packed_copies(self, model: Module, reads_head: bool) -> list[Module]:
        """Of layers that keep their weight beside a packed copy of it: those whose copy somebody reads.

        vLLM packs the embedding and the output head too. Nobody multiplies by the embedding; where the sampler reads
        the head's weight itself, nobody multiplies by that copy either, and packing it takes as long as ten layers.
        """
        read = []
        filled = {getattr(layer.module, target).data_ptr() for layer in self.layers for target in layer.shapes}
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not hasattr(module, "cpu_linear") or weight is None or not weight.numel():
                continue
            if weight.data_ptr() in filled:
                is_head = name.split(".")[-1] == "lm_head"
                if is_head and not reads_head:
                    read.append(module)
                else:
                    module.cpu_linear = torch.nn.functional.linear
        return read


def whole_weights(layer: Layer, weights: Weights, dtype: torch.dtype) -> Weights:
    """The policy's parameters that a layer is filled from; sharded ones (FSDP2) gathered, which all ranks do together.

    In the engine's dtype, so that no more travels than the engine takes.
    """
    return {name: whole_weight(weights[name], dtype) for name in layer.sources}


def whole_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A sharded parameter gathered, in `dtype`; any other one as it is."""
    if isinstance(weight, DTensor):
        weight = weight.to(dtype)
        assert isinstance(weight, DTensor)
        return weight.full_tensor()
    return weight


def pack(module: Any) -> None:
    """Have vLLM pack the layer's weight."""
    module.quant_method.process_weights_after_loading(module)


@torch.inference_mode()
def differs(layer: Layer, target: str, shape: torch.Size, weights: Weights, first: int | None) -> str | None:
    """The policy's parameter that an engine's does not agree with, bit for bit; None if it agrees.

    Args:
        first: where a few rows (of a packed layer: columns) begin that are compared, counted on beyond the last; None
            compares all.
    """
    parameter = getattr(layer.module, target)
    packed = parameter.shape != shape
    length = shape[-1] if packed else shape[0]
    lines = torch.arange(length)
    if first is not None:
        lines = (first + torch.arange(min(PROBES, length))) % length
    held = (
        columns(layer.module, lines, shape[-1], parameter.dtype).t()
        if packed
        else parameter.data[lines.to(parameter.device)]
    )
    for copy in layer.copies_to(target):
        dim = len(shape) - 1 if packed else 0
        side = copy.target_box[dim]
        inside = ((lines >= side.start) & (lines < side.stop)).nonzero().flatten()
        at = lines[inside] - side.start
        sent = weights[copy.source][copy.source_box].detach()
        sent = sent.index_select(dim, at.to(sent.device)).to(device=held.device, dtype=held.dtype)
        box = list(copy.target_box)
        box[dim] = inside.to(held.device)
        if not torch.equal(held[tuple(box)], sent):
            return copy.source
    return None


def columns(module: Any, which: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(which, outputs): columns of a packed layer's weight, exactly: each is what it makes of a 1 among zeros."""
    ones = torch.zeros(len(which), size, dtype=dtype)
    ones[torch.arange(len(which)), which] = 1.0
    return module.quant_method.apply(module, ones)


class Negated(Mapping[str, torch.Tensor]):
    """Weights of the other sign, made when asked for."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return -self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def disproof(plan: PlannedSync, weights: Weights) -> str | None:
    """Why the plan is wrong: it does not lead from other weights back to what a full reload of these has just made."""
    reloaded = fingerprint(plan.layers)
    plan.load(Negated(weights))
    negated = fingerprint(plan.layers)
    plan.load(weights)
    for layer, before, other, after in zip(plan.layers, reloaded, negated, fingerprint(plan.layers), strict=True):
        name = ", ".join(dict.fromkeys(copy.source for copy in layer.copies)) or type(layer.module).__name__
        if after != before:
            return f"{name} is not what a full reload makes of it"
        if other == before and before != ZEROS:
            return f"{name} is not reached by the plan"
    return None


@torch.inference_mode()
def fingerprint(layers: Sequence[Layer]) -> list[int]:
    """A checksum of what each layer holds; of a packed one, of what it makes of some rows."""
    return [_fingerprint(layer) for layer in layers]


def _fingerprint(layer: Layer) -> int:
    found = ZEROS
    held: torch.Tensor
    for target, shape in layer.shapes.items():
        parameter = getattr(layer.module, target)
        held = parameter.data if parameter.shape == shape else _products(layer.module, shape, parameter.dtype)
        if held.any():
            found = zlib.crc32(held.contiguous().view(torch.uint8).cpu().numpy().data, found)
    return found


def _products(module: Any, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(PROBES, shape[-1], generator=torch.Generator().manual_seed(0)).to(dtype)
    return module.quant_method.apply(module, rows)
