"""The output head on the CPU: logits in float32 where asked for, though the weights are bfloat16.

bfloat16 logits of magnitude 16 to 32 are 0.125 apart, which alone puts the log-probs 0.02 off on average. vLLM runs the
head in float32 where `head_dtype` asks for it. On CUDA the bfloat16 product accumulates straight into float32. On the
CPU torch has no such product, and the float32 one takes six times as long as the bfloat16 one. Two ways around it:

- kernels/head.cpp multiplies bfloat16 into float32 registers, and takes what sampling wants from there: no logit is
  written down. It needs AVX512-BF16 and plain sampling.
- Elsewhere two bfloat16 products do: they too accumulate in float32 and round at the very end, so a second one, from
  which the rounded result of the first is subtracted before its own rounding, gives what the first has lost.
"""

import ctypes
from dataclasses import dataclass

import torch

from rollout.backend.native import load_library
from rollout.sampling import BLOCK, Logits

PRODUCTS = 32
"""Elements that one instruction of kernels/head.cpp multiplies: the hidden size is a multiple of it."""


def logits_of(hidden_states: torch.Tensor, weight: torch.Tensor, head_dtype: torch.dtype | None) -> Logits:
    """hidden_states @ weight.T for this rank's shard of the vocabulary.

    Args:
        hidden_states: (rows, hidden).
        weight: (shard, hidden), of the same dtype.
        head_dtype: float32 to keep what the rounding to a half-precision dtype loses; None or the weight's own dtype
            for the rounded logits alone.

    Returns:
        Logits of the weight's dtype, (rows, shard).
    """
    high = torch.mm(hidden_states, weight.t())
    if head_dtype != torch.float32 or weight.dtype == torch.float32:
        return Logits(high)
    return Logits(high, torch.addmm(high, hidden_states, weight.t(), beta=-1.0))


class Head(ctypes.Structure):
    """kernels/head.cpp's Head, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "weight")),
        *((name, ctypes.c_int32) for name in ("rows", "size", "tokens")),
    ]


@dataclass(frozen=True)
class StreamedLogits:
    """hidden @ weight.T in float32, computed where it is asked for; implements `rollout.sampling.ShardLogits`.

    Attributes:
        library: of kernels/head.cpp, from `head_library`.
        hidden: (rows, size) bfloat16, contiguous.
        weight: (at least `tokens`, size) bfloat16, contiguous: the shard's rows of the head.
        tokens: the shard's tokens; the weight's rows behind them are padding.
    """

    library: ctypes.CDLL
    hidden: torch.Tensor
    weight: torch.Tensor
    tokens: int

    def log_masses(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ShardLogits.log_masses`: (rows,) float32 to twice (rows, blocks) float32."""
        sums = torch.empty(len(self.hidden), -(-self.tokens // BLOCK))
        peaks = torch.empty_like(sums)
        self.library.block_masses(self._head(), *_pointers(scale.contiguous(), sums, peaks))
        return sums.log_().add_(peaks), peaks

    def of_blocks(self, block: torch.Tensor) -> torch.Tensor:
        """As `ShardLogits.of_blocks`: (rows,) int64 to (rows, BLOCK) float32."""
        logits = torch.empty(len(self.hidden), BLOCK)
        self.library.logits_of_blocks(self._head(), *_pointers(block.contiguous(), logits))
        return logits

    def _head(self) -> object:
        rows, size = self.hidden.shape
        return ctypes.byref(Head(self.hidden.data_ptr(), self.weight.data_ptr(), rows, size, self.tokens))


def head_library(weight: torch.Tensor, head_dtype: torch.dtype | None) -> ctypes.CDLL | None:
    """The library of kernels/head.cpp if it serves this head and this machine, else None.

    Args:
        weight: (shard tokens, size), of the head.
        head_dtype: of its product; None takes the weight's.
    """
    served = weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.shape[1] % PRODUCTS == 0
    library = load_library("head") if served and head_dtype == torch.float32 else None
    return library if library is not None and hasattr(library, "block_masses") else None


def _pointers(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
