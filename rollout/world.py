"""torchrun's environment as a value: who this rank is, and the process groups it belongs to."""

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

# What torchrun sets in every rank. Part of them is a launcher that went half way: better refused than guessed at.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class World:
    """This rank's place in the job.

    Attributes:
        rank: of this process among all.
        local_rank: of this process on its machine; the index of its GPU.
        size: number of processes.
        device: the device that this rank trains and generates on.

    >>> World(rank=1, local_rank=1, size=2, device=torch.device("cpu")).is_main
    False
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def init_world(timeout_s: float = 600.0) -> World:
    """Join the job's default process group, or the one-process group of a plain `python`.

    Under torchrun the group is the one its variables name: gloo on the CPU, gloo and nccl on CUDA. A group that
    the trainer has already made is used as it is. Outside torchrun nothing can be reached from the network: the group's
    store lives in this process, and the socket that gloo opens for each group, even for one process alone, is on the
    loopback interface.

    Args:
        timeout_s: after which a collective that a rank never joins is an error.

    Raises:
        ValueError: if only some of torchrun's variables are set.
    """
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        with closed_to_the_network():
            if launched_by_torchrun():
                dist.init_process_group(backend, timeout=timeout)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(
        rank=dist.get_rank(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        size=dist.get_world_size(),
        device=device,
    )


@contextmanager
def closed_to_the_network() -> Iterator[None]:
    """Groups that are made inside listen on the loopback interface, if the whole job is on this machine.

    Each gloo group listens in every rank. By itself gloo takes the address that the host's name resolves to, which is
    often an outer one. A job is on this machine if its master address is a loopback address, or if it is one plain
    process. Of any other job the interface is gloo's choice, and GLOO_SOCKET_IFNAME is always the user's.
    """
    interface = _loopback_interface() if GLOO_INTERFACE not in os.environ and _is_on_this_machine() else None
    if interface is None:
        yield
        return
    os.environ[GLOO_INTERFACE] = interface  # gloo reads it whenever a group is made
    try:
        yield
    finally:
        os.environ.pop(GLOO_INTERFACE, None)


def launched_by_torchrun() -> bool:
    """True under torchrun, or another launcher that sets its variables; False in a plain process.

    Raises:
        ValueError: if only some of the variables are set.
    """
    present = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if present and len(present) < len(TORCHRUN_VARIABLES):
        missing = sorted(set(TORCHRUN_VARIABLES) - set(present))
        raise ValueError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}: "
            "start the job with torchrun, or unset them to run one process"
        )
    return bool(present)


def tensor_parallel_group(world: World, tensor_parallel_size: int, timeout_s: float | None = None) -> dist.ProcessGroup:
    """A gloo group of the ranks that share this rank's copy of the engine. Called by all ranks, in the same order.

    Ranks are grouped in order, as vLLM does: with a size of 2, ranks 0 and 1, ranks 2 and 3, and so on.

    Args:
        timeout_s: of the group's collectives; None takes torch's default for gloo.

    Raises:
        ValueError: if the size does not divide the world.
    """
    check_tensor_parallel_size(tensor_parallel_size, world.size)
    mine = None
    for first in range(0, world.size, tensor_parallel_size):
        ranks = list(range(first, first + tensor_parallel_size))
        with closed_to_the_network():
            group = dist.new_group(ranks, None if timeout_s is None else timedelta(seconds=timeout_s), backend="gloo")
        if world.rank in ranks:
            mine = group
    assert mine is not None
    return mine


def check_tensor_parallel_size(tensor_parallel_size: int, world_size: int) -> None:
    """Refuse a tensor-parallel size that does not divide the job.

    >>> check_tensor_parallel_size(4, world_size=2)
    Traceback (most recent call last):
    ...
    ValueError: rollout.tensor_parallel_size is 4, which does not divide the 2 ranks of this job: \
use a divisor of 2, or start with torchrun --nproc_per_node=4
    """
    if world_size % tensor_parallel_size:
        raise ValueError(
            f"rollout.tensor_parallel_size is {tensor_parallel_size}, which does not divide the {world_size} "
            f"rank{'s' if world_size > 1 else ''} of this job: use a divisor of {world_size}, "
            f"or start with torchrun --nproc_per_node={tensor_parallel_size}"
        )


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def _is_on_this_machine() -> bool:
    host = os.environ.get("MASTER_ADDR")
    if host is None:  # a plain process, unless the trainer has found its other ranks by itself
        return not dist.is_initialized() or dist.get_world_size() == 1
    try:
        addresses = [address[0] for *_, address in socket.getaddrinfo(host, None)]
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _loopback_interface() -> str | None:
    """Its name: "lo" on Linux, "lo0" elsewhere."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.family == socket.AF_INET and address.address == "127.0.0.1" for address in addresses):
            return name
    return None
