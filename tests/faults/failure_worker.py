"""Runs in every rank: rank 1 breaks in one way or another while rank 0 is busy with something else.

torchrun --nproc_per_node=2 failure_worker.py OUT HOW WHILE
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rollout import init_world, watched


class PlantedError(Exception):
    pass


def breaks(how: str, watch) -> None:
    """What rank 1 does."""
    time.sleep(1.0)
    if how == "exception":
        raise PlantedError("on the main thread")
    if how == "thread":

        def of_thread() -> None:
            raise PlantedError("on another thread")

        threading.Thread(target=of_thread, name="the-other").start()
        threading.Event().wait()
    if how == "stall":
        with watch.busy("standing still"):
            threading.Event().wait()
    if how == "exit":
        sys.exit(0)
    if how == "caught":
        try:
            raise PlantedError("on the main thread")
        except PlantedError as error:
            watch.report(error)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how.startswith("launcher"):
        os.kill(os.getppid(), signal.SIGKILL)
        dist.barrier()
        time.sleep(60.0)


def read_by_nobody(*descriptors: int) -> None:
    """As where the job's output goes through a pipe, and the reader ends with the connection."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in descriptors:
        os.dup2(writer, descriptor)
    os.close(writer)


class Slow(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        time.sleep(30.0)
        return index


def is_busy(what: str) -> None:
    """What rank 0 does meanwhile: none of it ends by itself, or looks at anything; but for "nothing"."""
    if what == "collective":
        dist.barrier()
        time.sleep(60.0)
    if what == "backward":
        weight = torch.randn(1500, 1500, requires_grad=True)
        while True:
            (weight @ weight @ weight).sum().backward()
    if what == "data worker":
        next(iter(torch.utils.data.DataLoader(Slow(), num_workers=2)))
    if what == "handler":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()
        time.sleep(60.0)
    if what == "spin":
        flag = torch.zeros(1).share_memory_()
        while not flag[0]:
            pass


def main() -> None:
    out, how, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    world = init_world()
    (out / f"pid{world.rank}").write_text(str(os.getpid()))
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(world.rank)  # as on nodes of which one came in place of another
    stall_timeout_s = 2.0
    if how.endswith("nobody reads"):
        read_by_nobody(sys.stdout.fileno(), sys.stderr.fileno())
        stall_timeout_s = 60.0  # or the last resort, C's own thread, would end what the watch does not
    with watched(out, stall_timeout_s) as watch:
        dist.barrier()
        (out / "start").write_text(repr(time.time()))
        if world.rank == 1:
            breaks(how, watch)
        else:
            is_busy(what)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
