"""Does a layer of the engine hold what the policy sent: some rows of it, or some columns of a packed one, or all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rollout.backend.shard_exchange import Box
from rollout.backend.sync_plan import Copy, Layer

PROBES = 4
"""Rows that a packed layer multiplies to show what it holds; and rows of a large parameter that a check looks at."""


@dataclass(frozen=True)
class Filled:
    """A parameter of an engine's layer on one rank, and what fills it. Goes to the other ranks as it is.

    Attributes:
        target: its name in the layer.
        shape: as loaders see it, before it is packed.
        packed: True if the engine holds it in another form.
        dtype: the engine's.
        copies: that fill it.
    """

    target: str
    shape: torch.Size
    packed: bool
    dtype: torch.dtype
    copies: list[Copy]

    @property
    def compared_dim(self) -> int:
        """A packed parameter shows its columns, any other one its rows."""
        return len(self.shape) - 1 if self.packed else 0


@dataclass(frozen=True)
class Strip:
    """A part of a copy that is compared.

    Attributes:
        source: name of the policy's parameter.
        source_box: of it.
        lines_box: of the compared lines, which stand one behind the other along the parameter's compared dimension.
    """

    source: str
    source_box: Box
    lines_box: Box


def filled(layer: Layer) -> list[Filled]:
    """The parameters of a layer on this rank."""
    found = []
    for target, shape in layer.shapes.items():
        parameter = getattr(layer.module, target)
        found.append(Filled(target, shape, parameter.shape != shape, parameter.dtype, layer.copies_to(target)))
    return found


def compared_lines(of: Filled, first: int | None) -> list[slice]:
    """Rows or columns that are compared, one stretch of them or two.

    Args:
        first: where PROBES lines begin, counted on beyond the last one; None means all.
    """
    length = of.shape[of.compared_dim]
    if first is None or length <= PROBES:
        return [slice(0, length)]
    start = first % length
    stop = start + PROBES
    return [slice(start, min(stop, length))] + ([slice(0, stop - length)] if stop > length else [])


def strips(of: Filled, first: int | None) -> list[Strip]:
    """What a comparison needs of the policy; from what is known of a rank, so that the others know it, too.

    Args:
        first: as in `compared_lines`.
    """
    dim, found, before = of.compared_dim, [], 0
    for lines in compared_lines(of, first):
        for copy in of.copies:
            side = copy.target_box[dim]
            start, stop = max(lines.start, side.start), min(lines.stop, side.stop)
            if start < stop:
                source_start = copy.source_box[dim].start + start - side.start
                source_box, lines_box = list(copy.source_box), list(copy.target_box)
                source_box[dim] = slice(source_start, source_start + stop - start)
                lines_box[dim] = slice(before + start - lines.start, before + stop - lines.start)
                found.append(Strip(copy.source, tuple(source_box), tuple(lines_box)))
        before += lines.stop - lines.start
    return found


@torch.inference_mode()
def differs(layer: Layer, of: Filled, first: int | None, sent: Sequence[torch.Tensor]) -> str | None:
    """The policy's parameter that an engine's does not agree with, bit for bit; None if it agrees.

    Args:
        first: as in `compared_lines`.
        sent: what the policy has in each of the `strips`, in any dtype.
    """
    parameter = getattr(layer.module, of.target)
    which = torch.cat([torch.arange(lines.start, lines.stop) for lines in compared_lines(of, first)])
    held = (
        columns(layer.module, which, of.shape[-1], parameter.dtype).t()
        if of.packed
        else parameter.data[which.to(parameter.device)]
    )
    for strip, policy in zip(strips(of, first), sent, strict=True):
        if not torch.equal(held[strip.lines_box], policy.to(device=held.device, dtype=held.dtype)):
            return strip.source
    return None


def columns(module: Any, which: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(which, outputs): columns of a packed layer's weight, exactly: each is what it makes of a 1 among zeros."""
    ones = torch.zeros(len(which), size, dtype=dtype)
    ones[torch.arange(len(which)), which] = 1.0
    return module.quant_method.apply(module, ones)
