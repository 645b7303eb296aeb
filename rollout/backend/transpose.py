"""Copies into buffers that lie transposed in memory: oneDNN packs a weight from these two to three times as fast.

A linear layer's weight is (outputs, inputs); oneDNN blocks it by inputs and reads it fastest where the outputs of an
input stand side by side. torch's own copy into such a buffer takes ten times as long as a plain one,
kernels/transpose.cpp's half as long again.
"""

import ctypes

import torch

from rollout.backend.native import load_library

NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class Copy(ctypes.Structure):
    """kernels/transpose.cpp's Copy, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", "target")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "source_stride", "target_stride")),
    ]


def transposed_buffer(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """(outputs, inputs) of zeros, an input's outputs side by side; the other way round where the kernel is missing.

    >>> transposed_buffer(torch.Size([2, 3]), torch.float16).stride()
    (3, 1)
    """
    if len(shape) == 2 and dtype in NAMES and load_library("transpose") is not None:
        return torch.zeros(shape[1], shape[0], dtype=dtype).t()
    return torch.zeros(shape, dtype=dtype)


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)`, faster where the target lies transposed.

    Args:
        target: any shape, dtype and layout.
        source: of the same shape, any dtype and layout; the two do not overlap.

    >>> target = torch.zeros(3, 2).t()
    >>> copy_into(target, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    >>> target.tolist()
    [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    """
    if _served(target, source):
        library = load_library("transpose")
        assert library is not None, "_served has asked"
        rows, columns = source.shape
        what = Copy(source.data_ptr(), target.data_ptr(), rows, columns, source.stride(0), target.stride(1))
        getattr(library, f"{NAMES[source.dtype]}_to_{NAMES[target.dtype]}")(ctypes.byref(what))
    else:
        target.copy_(source)


def _served(target: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        target.dim() == 2
        and target.stride(0) == 1
        and target.stride(1) >= target.shape[0] > 1
        and source.stride(1) == 1
        and target.shape == source.shape
        and source.stride(0) >= source.shape[1]
        and target.dtype in NAMES
        and source.dtype in NAMES
        and target.device.type == source.device.type == "cpu"
        and load_library("transpose") is not None
    )
