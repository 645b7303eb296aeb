"""What the engine gives back between two phases of generation, and how it takes it again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.platforms import current_platform

from rollout.backend.memory import GIB, release_pages
from rollout.config import Sleep

# By what vLLM's sleep mode calls them. A part that a later sleep of the same kind finds given back stays so.
PARTS: dict[Sleep, tuple[str, ...]] = {"nothing": (), "kv_cache": ("kv_cache",), "all": ("weights", "kv_cache")}


class SleepingMemory:
    """A worker's memory that only generation needs. On the execute thread.

    Args:
        worker: vLLM's; on a GPU with sleep mode on, unless it gives nothing back.
        kv_caches: the tensors of the KV cache.
        sleep: what is given back on a GPU. On the CPU it is the KV cache's pages, which come back by themselves.
    """

    def __init__(self, worker: Any, kv_caches: list[torch.Tensor], sleep: Sleep) -> None:
        self._worker, self._kv_caches, self._sleep = worker, kv_caches, sleep
        self.given_back: dict[str, int] = {}
        """The bytes, by the parts that went together."""

    def give_back(self) -> int:
        """Let go; what stands there is lost. The KV cache's blocks must be free, and forgotten by the prefix cache.

        Returns:
            The bytes that this rank gave back.
        """
        if current_platform.is_cpu():
            return release_pages(self._kv_caches)
        parts = [part for part in PARTS[self._sleep] if part not in self.given_back]
        if not parts:
            return 0
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        if "weights" in parts:
            self._worker.sleep(level=2)  # buffers that no sync fills are kept in the host's memory
        else:
            self._worker.discard(tuple(parts))
        num_bytes = max(0, torch.cuda.mem_get_info()[0] - free)
        self.given_back |= dict.fromkeys(parts, num_bytes)
        return num_bytes

    def take_again(self, *parts: str) -> None:
        """Those of the parts that were given back.

        Raises:
            MemoryError: if the GPU has not got it any more; says who holds it.
        """
        asleep = [part for part in parts if part in self.given_back]
        if not asleep:
            return
        torch.cuda.empty_cache()  # what the trainer's allocator keeps for later
        with explained_shortage(" and ".join(asleep), self.given_back[asleep[0]]):
            self._worker.wake_up(asleep)
        for part in asleep:
            del self.given_back[part]


@contextmanager
def explained_shortage(wanted: str, num_bytes: int) -> Iterator[None]:
    """Turn an error of the GPU's memory into one that says who holds it, and what to do.

    Raises:
        MemoryError: in place of that one.
    """
    try:
        yield
    except RuntimeError as error:  # torch's is one of these, and vLLM's allocator raises the plain one
        if "out of memory" not in str(error):
            raise
        free, total = torch.cuda.mem_get_info()
        trainer, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        raise MemoryError(
            f"the engine cannot take its {wanted} again: it gave back {num_bytes / GIB:.1f} GiB, and "
            f"{free / GIB:.1f} of the GPU's {total / GIB:.1f} GiB are free. Tensors of this process hold "
            f"{trainer / GIB:.1f} GiB, torch keeps {(reserved - trainer) / GIB:.1f} more, and the rest is other "
            "processes' and libraries'. Let go of what the training phase left (gradients, batches), or lower "
            "rollout.gpu_memory_utilization or rollout.kv_cache_gib"
        ) from error
