"""Sums over all ranks, and the one place where a loss is corrected for DDP's averaging.

Every loss and every statistic of this folder is a sum over tokens divided by the number of valid tokens of ALL ranks
and ALL micro-batches. Such parts add up: over micro-batches by accumulation, over ranks by `sum_over_ranks`. So any
cut of a batch into ranks and micro-batches gives the numbers of the one big batch.

Ranks here are data-parallel ranks. To the trainer every rank is one, also where the rollout engine groups them for
tensor parallelism.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The elementwise sum of every rank's tensor; a collective once torch.distributed is initialised.

    Args:
        tensor: any shape, the same on every rank; not changed.
        group: the ranks that take part; None means all.

    Returns:
        A new tensor of the same shape, the same on all ranks; without torch.distributed, a copy.

    >>> sum_over_ranks(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total


def max_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The elementwise maximum of every rank's tensor, of any shape; arguments and result as `sum_over_ranks`.

    >>> max_over_ranks(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """
    largest = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def undo_ddp_mean(loss: torch.Tensor) -> torch.Tensor:
    """The loss, a scalar, times the number of ranks, as the last thing before `backward`.

    DistributedDataParallel averages gradients over ranks: it divides their sum by the number of ranks. The parts of
    the loss are already divided by the global number of tokens, so it is their sum that is wanted.

    >>> undo_ddp_mean(torch.tensor(2.0))
    tensor(2.)
    """
    return loss * dist.get_world_size() if dist.is_initialized() else loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of a sharded one in its global shape, on every rank: a collective then.

    >>> whole(torch.tensor(2.0))
    tensor(2.)
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_main() -> bool:
    """True on rank 0, and without torch.distributed."""
    return not dist.is_initialized() or dist.get_rank() == 0
