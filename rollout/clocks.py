"""How far the clocks of a job's machines are apart: each one's `time.perf_counter` begins when it was switched on."""

import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from rollout.world import BOOT_ID, gathered

PINGS = 20


def this_clock() -> str:
    """The same in all processes of a machine, in its containers too, and until it is started anew: they share a clock.

    >>> this_clock() == this_clock() != ""
    True
    """
    try:
        return BOOT_ID.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def seconds_ahead(machine: str | None = None, clock: Callable[[], float] = time.perf_counter) -> float:
    """How far this rank's clock is ahead of rank 0's; called by all ranks.

    0 on rank 0's own machine. From another machine one rank asks rank 0 for its time (Cristian 1989): of PINGS
    questions the one that was answered soonest counts, and the error is at most half of the time that it took.

    Args:
        machine: this rank's; None takes `this_clock`.
        clock: in seconds.
    """
    machines = gathered(machine or this_clock())
    if set(machines) == {machines[0]}:
        return 0.0
    rank = dist.get_rank()
    group = dist.new_group(backend="gloo")  # the default one may be nccl's alone
    found = {machines[0]: 0.0}
    for other in dict.fromkeys(machines[1:]):
        asking = machines.index(other)
        if other == machines[0]:
            continue
        if rank == 0:
            _answer(asking, clock, group)
        elif rank == asking:
            found[other] = _ask(clock, group)
    everyones = gathered(found)
    dist.destroy_process_group(group)
    return next(each[machines[rank]] for each in everyones if machines[rank] in each)


def _ask(clock: Callable[[], float], group: dist.ProcessGroup) -> float:
    """The least uncertain of PINGS differences to rank 0's clock."""
    best = (float("inf"), 0.0)
    time_there = torch.zeros(1, dtype=torch.float64)
    for _ in range(PINGS):
        asked = clock()
        dist.send(time_there, dst=0, group=group)
        dist.recv(time_there, src=0, group=group)
        answered = clock()
        best = min(best, (answered - asked, (asked + answered) / 2 - time_there.item()))
    return best[1]


def _answer(asking: int, clock: Callable[[], float], group: dist.ProcessGroup) -> None:
    asked = torch.zeros(1, dtype=torch.float64)
    for _ in range(PINGS):
        dist.recv(asked, src=asking, group=group)
        dist.send(torch.tensor([clock()], dtype=torch.float64), dst=asking, group=group)
