"""Memory that the other phase can have: the KV cache's pages, given back between two phases of generation."""

import ctypes
import mmap
from collections.abc import Iterable

import torch

GIB = 1024**3
MADV_DONTNEED = 4  # Linux: the pages go; the next touch finds zeros


def release_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Give the pages under the tensors' storages back to the operating system; returns the bytes.

    The tensors stay where they are and read as zeros, until they are written again. Pages that a storage only begins or
    ends in are kept.

    Raises:
        OSError: if the operating system refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    released = 0
    for start, length in storages.items():
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if size <= 0:
            continue
        if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise(MADV_DONTNEED) failed on the KV cache")
        released += size
    return released
