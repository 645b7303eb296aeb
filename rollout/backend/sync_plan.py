"""Which part of which policy parameter fills which part of which engine parameter on this rank: found once, then used.

vLLM's loaders know it: they fuse q, k and v, cut rows and columns for this rank, pad the vocabulary. So each policy
parameter is loaded once with the numbers of its elements in place of its weights, into stand-ins for the engine's
parameters, and where the numbers arrive is read off. No table of architectures: a loader that does more than move
rectangles (a transposed copy of a part, arithmetic) gives no plan, and the engine goes on reloading whole checkpoints.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _get_weight_loader,
    _place_kernel_tensors,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

from rollout.backend.shard_exchange import Box
from rollout.failure import beat

UNTOUCHED, PADDING = -1, 0
"""What a stand-in holds where nothing arrived, and where a loader filled in zeros; rows are numbered from 1."""

MOST_STAND_INS = 10**11
"""Elements of all stand-ins of a plan, which are minutes. A dense model takes two to six for each of this rank's
parameters; a mixture whose checkpoint has each expert by itself takes as many for each expert, which would be hours."""


class NoPlan(Exception):
    """A loader does what no copy of rectangles does; says which."""


@dataclass(frozen=True)
class Copy:
    """A rectangle of a policy parameter, and the rectangle of an engine parameter that it fills.

    Attributes:
        source: name of the policy's parameter, as in a checkpoint.
        target: name of the engine's parameter in its layer, such as "weight".
    """

    source: str
    source_box: Box
    target: str
    target_box: Box


@dataclass
class Layer:
    """A layer of the engine, and what fills it.

    Attributes:
        module: vLLM's.
        shapes: of its parameters as loaders see them, before they are packed.
        sources: the policy's parameters that go there, on whatever rank: the same on all ranks, and in the same order.
        copies: this rank's.
    """

    module: Any
    shapes: dict[str, torch.Size]
    sources: list[str]
    copies: list[Copy]

    def copies_to(self, target: str) -> list[Copy]:
        """Those that fill one of its parameters."""
        return [copy for copy in self.copies if copy.target == target]


@dataclass(frozen=True)
class Place:
    """Where one call of a loader put numbers along one dimension.

    Attributes:
        shape: of the engine's parameter.
        box: of it, filled.
        start: the first number that arrived, from 0.
    """

    layer: torch.nn.Module
    target: str
    shape: torch.Size
    box: Box
    start: int


@dataclass(frozen=True)
class Arrival:
    """One call of a loader, with numbers in place of weights.

    Attributes:
        stand_in: int32, of the engine's parameter's shape: what the call filled.
    """

    layer: torch.nn.Module
    target: str
    stand_in: torch.Tensor


def make_plan(model: torch.nn.Module, shapes: Mapping[str, torch.Size]) -> list[Layer]:
    """Load numbers in place of weights, and see where they arrive; the engine's weights stay as they are.

    Along each dimension of a parameter its rows are numbered in a load of their own: the numbers are a view of a few
    bytes, whatever the size of the parameter.

    Args:
        model: the engine's.
        shapes: of the policy's parameters, by their checkpoint names.

    Returns:
        The layers that the policy fills, in the model's order.

    Raises:
        NoPlan: if a loader does more than copy rectangles, fails on numbers in place of weights, or it would take more
            than MOST_STAND_INS.
    """
    arrivals: list[Arrival] = []
    layers: dict[torch.nn.Module, Layer] = {}
    stand_ins = 0
    with _recording(model, arrivals):
        for source, shape in shapes.items():
            beat()  # of a big model this takes minutes
            places: list[list[Place]] = []
            for dim in range(len(shape)):
                arrivals.clear()
                try:
                    model.load_weights([(source, _numbers(shape, dim))])  # type: ignore[operator]
                except Exception as error:  # whatever loaders check: they have never seen whole numbers
                    raise NoPlan(f"{source}: {error!r}") from error
                stand_ins += sum(arrival.stand_in.numel() for arrival in arrivals)
                if stand_ins > MOST_STAND_INS:
                    raise NoPlan(f"{source}: the plan takes more than {MOST_STAND_INS:.0e} elements in stand-ins")
                places.append([_read_off(arrival, dim) for arrival in arrivals])
            if not places or not places[0]:
                raise NoPlan(f"no loader took {source}")
            for of_dims in zip(*places, strict=True):
                place = of_dims[0]
                if any(other.box != place.box for other in of_dims):
                    raise NoPlan(f"{source} arrives in another place each time")
                starts_and_sides = zip((each.start for each in of_dims), place.box, strict=True)
                source_box = tuple(slice(start, start + side.stop - side.start) for start, side in starts_and_sides)
                layer = layers.setdefault(place.layer, Layer(place.layer, {}, [], []))
                layer.shapes[place.target] = place.shape
                if source not in layer.sources:
                    layer.sources.append(source)
                if all(side.stop > side.start for side in source_box):  # else this rank holds no part of it
                    layer.copies.append(Copy(source, source_box, place.target, place.box))
    return [layers[module] for module in model.modules() if module in layers]


def _numbers(shape: torch.Size, dim: int) -> torch.Tensor:
    """(shape) int32: 1, 2, ... along one dimension, the same along the others."""
    sizes = [1] * len(shape)
    sizes[dim] = shape[dim]
    return torch.arange(1, shape[dim] + 1, dtype=torch.int32).view(sizes).expand(shape)


@contextmanager
def _recording(model: torch.nn.Module, arrivals: list[Arrival]) -> Iterator[None]:
    """The model in the form that loaders expect, on no device; they fill stand-ins, and what arrives is noted."""
    initialize_layerwise_reload(model)
    changed: list[tuple[torch.Tensor, Callable]] = []
    try:
        for layer in model.modules():
            for name, tensor in get_layer_tensors(layer).items():
                changed.append((tensor, _get_weight_loader(tensor)))
                tensor.weight_loader = _recorder(layer, name, _get_original_loader(tensor), arrivals)
        yield
    finally:
        for tensor, loader in reversed(changed):
            tensor.weight_loader = loader
        for layer in model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                _place_kernel_tensors(layer, info)
                info.reset()
        model._do_torchao_reload = model._original_do_torchao_reload


def _recorder(layer: torch.nn.Module, target: str, load: Callable, arrivals: list[Arrival]) -> Callable:
    def recorder(parameter: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        stand_in = materialize_meta_tensor(parameter)
        stand_in.data = torch.full(parameter.shape, UNTOUCHED, dtype=torch.int32)
        result = load(stand_in, *args, **kwargs)
        arrivals.append(Arrival(layer, target, stand_in.data))
        return result

    return recorder


def _read_off(arrival: Arrival, dim: int) -> Place:
    """Where the numbers along one dimension went.

    Raises:
        NoPlan: if that is no rectangle, or they do not count up along the same dimension.
    """
    stand_in = arrival.stand_in
    arrived = stand_in > PADDING
    if not arrived.any():
        return Place(arrival.layer, arrival.target, stand_in.shape, (slice(0, 0),) * stand_in.dim(), 0)
    box = _bounds(arrived)
    numbers = stand_in[box]
    start = int(numbers.min())
    sizes = [1] * numbers.dim()
    sizes[dim] = numbers.shape[dim] if dim < numbers.dim() else 0
    counted = torch.arange(start, start + sizes[dim], dtype=torch.int32).view(sizes)
    if not (numbers == counted).all():
        raise NoPlan(f"a loader of {arrival.target} does more than copy a rectangle")
    return Place(arrival.layer, arrival.target, stand_in.shape, box, start - 1)


def _bounds(arrived: torch.Tensor) -> Box:
    """The smallest box around all that is True."""
    box = []
    for dim in range(arrived.dim()):
        others = [other for other in range(arrived.dim()) if other != dim]
        hit = (arrived.any(dim=tuple(others)) if others else arrived).nonzero()
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)
