"""torchrun's environment as a value: who this rank is, and the process groups it belongs to."""

import ipaddress
import os
import socket
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

# What torchrun sets in every rank. Part of them is a launcher that went half way: better refused than guessed at.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
SHARED_MEMORY, BOOT_ID = Path("/dev/shm"), Path("/proc/sys/kernel/random/boot_id")
ELSEWHERE = "192.0.2.1"  # of RFC 5737: an address that nobody has, on the far side of the default route
T = TypeVar("T")


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


@dataclass(frozen=True)
class Machine:
    """What ranks share memory in: a host, or a container of one.

    Attributes:
        name: of the host, for messages.
        key: the same for all processes that see the same shared memory, and for no others.
    """

    name: str
    key: str


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

    Each gloo group listens in every rank. By itself gloo takes the address that the host's name resolves to: often an
    outer one though the job is on this machine, and often a loopback address, which no other machine reaches, though it
    is not. A job is on this machine if its master address is a loopback address, or if it is one plain process. The
    groups of any other job listen on the interface that leads to its master, and GLOO_SOCKET_IFNAME is always the
    user's.
    """
    interface = None
    if GLOO_INTERFACE not in os.environ:
        interface = _loopback_interface() if _is_on_this_machine() else _outer_interface()
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


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order; a collective of the group, by default of all ranks. Small ones: pickled."""
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, value, group=group)
    return everyones


def check_tensor_parallel_size(tensor_parallel_size: int, world_size: int) -> None:
    """Refuse a tensor-parallel size that does not divide the job.

    Raises:
        ValueError: if it does not; names a size that does.

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


def this_machine() -> Machine:
    """The one that this process runs on."""
    name = socket.gethostname()
    try:
        boot, memory = BOOT_ID.read_text().strip(), SHARED_MEMORY.stat()
    except OSError:  # not Linux: one host, one memory
        return Machine(name, name)
    return Machine(name, f"{boot}/{memory.st_dev}/{memory.st_ino}")


def machines_of_ranks() -> tuple[Machine, ...]:
    """By rank, the machine that it runs on. The first call in a job is a collective; its answer is kept."""
    group = dist.group.WORLD
    if group not in _machines:
        _machines[group] = tuple(gathered(this_machine()))
    return _machines[group]


_machines: "weakref.WeakKeyDictionary[dist.ProcessGroup | None, tuple[Machine, ...]]" = weakref.WeakKeyDictionary()


def check_machines(tensor_parallel_size: int | None, machines: Sequence[Machine]) -> None:
    """Refuse a tensor-parallel group that lies on more than one machine: its ranks share memory.

    Args:
        tensor_parallel_size: as it was given; None means all ranks. Divides their number.
        machines: of all ranks.

    Raises:
        ValueError: if one does; says how to start instead.

    >>> check_machines(2, [Machine("a", "1"), Machine("a", "1"), Machine("b", "2"), Machine("b", "2")])
    >>> check_machines(2, [Machine("a", "1"), Machine("b", "2"), Machine("b", "2"), Machine("b", "2")])
    Traceback (most recent call last):
    ...
    ValueError: rollout.tensor_parallel_size is 2, and ranks 0 to 1, which make one copy of the engine, are on 2 \
machines (rank 0 on a, rank 1 on b), where they share no memory: start a multiple of 2 ranks on each machine \
(torchrun --nnodes=2 --nproc_per_node=2), or set rollout.tensor_parallel_size=1
    """
    size = len(machines) if tensor_parallel_size is None else tensor_parallel_size
    for first in range(0, len(machines), size):
        of_group = machines[first : first + size]
        hosts = len({machine.key for machine in of_group})
        if hosts > 1:
            said = "null, which means all" if tensor_parallel_size is None else tensor_parallel_size
            where = ", ".join(f"rank {first + number} on {machine.name}" for number, machine in enumerate(of_group))
            total = len({machine.key for machine in machines})
            fewest = min(sum(each.key == machine.key for each in machines) for machine in machines)
            smaller = max(each for each in range(1, fewest + 1) if fewest % each == 0 and size % each == 0)
            raise ValueError(
                f"rollout.tensor_parallel_size is {said}, and ranks {first} to {first + size - 1}, which make one copy "
                f"of the engine, are on {hosts} machines ({where}), where they share no memory: start a multiple of "
                f"{size} ranks on each machine (torchrun --nnodes={total} --nproc_per_node={size}), or set "
                f"rollout.tensor_parallel_size={smaller}"
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
    if _on_several_agents() and host != "localhost" and not _is_literal(host):
        return False  # a name: Debian's /etc/hosts gives a host's own one a loopback address
    addresses = _addresses(host)
    return bool(addresses) and all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _on_several_agents() -> bool:
    """True if more than one torchrun, on whatever machines, started the job."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", ranks) != ranks


def _is_literal(host: str) -> bool:
    """True for an address, False for a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _addresses(host: str) -> list[str]:
    """That the name resolves to, none if it is unknown."""
    try:
        return [str(address[0]).partition("%")[0] for *_, address in socket.getaddrinfo(host, None)]
    except OSError:
        return []


def _outer_interface() -> str | None:
    """The interface that leads to the master; on the master's own host that of its outer address."""
    host = os.environ.get("MASTER_ADDR")
    addresses = [] if host is None else _addresses(host)
    outer = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    for address in [*outer, ELSEWHERE]:
        interface = _interface_of(_source_address(address))
        if interface is not None and interface != _loopback_interface():
            return interface
    return None


def _source_address(target: str) -> str | None:
    """The address of this host that packets to the target would come from; none is sent."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return probe.getsockname()[0]
    except OSError:
        return None


def _loopback_interface() -> str | None:
    """Its name: "lo" on Linux, "lo0" elsewhere."""
    return _interface_of("127.0.0.1")


def _interface_of(wanted: str | None) -> str | None:
    """The name of the interface that has the address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == wanted for address in addresses):
            return name
    return None
