"""The policy's weights into the worker's: by the plan where there is one, through vLLM's reload elsewhere."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Parameter

from rollout.backend.sync_plan import Layer

PROBES = 4  # rows that a packed layer multiplies, to be compared


class PlannedSync:
    """Copies by a plan; a packed layer (oneDNN on the CPU) is filled in a buffer and packed again.

    Args:
        layers: of `make_plan`.
        dtype: of the engine's weights.
    """

    def __init__(self, layers: list[Layer], dtype: torch.dtype) -> None:
        self._layers = layers
        self._dtype = dtype
        self._buffers: dict[torch.Size, torch.Tensor] = {}

    @torch.inference_mode()
    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        for layer in self._layers:
            packed = False
            for target, shape in layer.shapes.items():
                parameter = getattr(layer.module, target)
                if parameter.shape != shape:
                    packed = True
                    parameter = Parameter(self._buffer(shape), requires_grad=False)
                    setattr(layer.module, target, parameter)
                for copy in layer.copies:
                    if copy.target == target:
                        parameter.data[copy.target_box].copy_(weights[copy.source][copy.source_box])
            if packed:
                layer.module.quant_method.process_weights_after_loading(layer.module)

    def _buffer(self, shape: torch.Size) -> torch.Tensor:
        if shape not in self._buffers:
            self._buffers[shape] = torch.zeros(shape, dtype=self._dtype)
        return self._buffers[shape]


@torch.inference_mode()
def fingerprint(layers: list[Layer]) -> dict[str, int]:
    """A checksum of each layer's weights, by its place; of what a packed one makes of some numbers."""
    found = {}
    for place, layer in enumerate(layers):
        for target, shape in layer.shapes.items():
            parameter = getattr(layer.module, target)
            held = parameter.data if parameter.shape == shape else probe(layer.module, shape)
            found[f"{place}.{target}"] = zlib.crc32(held.contiguous().view(torch.uint8).numpy())
    return found


def probe(module: Any, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(PROBES, shape[-1], generator=generator).to(torch.bfloat16)
    return module.quant_method.apply(module, rows)
