"""Runs in every rank: scripts/ppo.py, and on one rank something goes wrong in one training step.

    torchrun --nproc_per_node=2 job.py FAULT RANK STEP OUT [what scripts/ppo.py takes]

OUT/fault gets the time (seconds since 1970) at which it happened. What happens inside a phase of generation happens in
its decode step AT_DECODE_STEP, to request REQUEST where it happens to one.
"""

import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from vllm.v1.request import RequestStatus

import trainers.loop
from rollout import RolloutConfig, RolloutEngine
from rollout.backend.planned_sync import PlannedSync
from trainers.cli import run_cli
from trainers.config import PPOConfig
from trainers.ppo import train_ppo
from trainers.scoring import Scoring

AT_DECODE_STEP, REQUEST = 5, "3"


class PlantedError(Exception):
    pass


def happens() -> None:
    (Path(sys.argv[4]) / "fault").write_text(repr(time.time()))


def raises(where: str) -> Callable[..., None]:
    def fault(*_: Any) -> None:
        happens()
        raise PlantedError(where)

    return fault


def before(owner: Any, name: str, call: int, fault: Callable[..., Any]) -> None:
    """Put `fault`, with the same arguments, before one call of a function or method, counted from 0."""
    function, calls = getattr(owner, name), count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            fault(*args)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def in_decoding(step: int, part: Callable[[RolloutEngine], tuple[Any, str]], fault: Callable[..., Any]) -> None:
    """Before the worker's, scheduler's, ... method in AT_DECODE_STEP of the phase of a training step."""

    def arm(engine: RolloutEngine, *_: Any) -> None:
        before(*part(engine), AT_DECODE_STEP, lambda *args: fault(engine, *args))

    before(RolloutEngine, "generate", step, arm)


def execution(engine: RolloutEngine) -> tuple[Any, str]:
    return engine._core.executor.driver_worker.worker, "execute_model"


def sampling(engine: RolloutEngine) -> tuple[Any, str]:
    return engine._core.executor.driver_worker.worker, "sample_tokens"


def scheduling(engine: RolloutEngine) -> tuple[Any, str]:
    return engine._core.scheduler, "schedule"


def taking_output(engine: RolloutEngine) -> tuple[Any, str]:
    return engine._core.scheduler, "take_output"


def sends(signal_number: int, receiver: Callable[[], int]) -> Callable[..., None]:
    def fault(*_: Any) -> None:
        happens()
        os.kill(receiver(), signal_number)
        time.sleep(2.0)  # it takes a moment to arrive, in which nothing else should happen

    return fault


def hangs(*_: Any) -> None:
    happens()
    threading.Event().wait()


def hangs_with_the_lock(*_: Any) -> None:
    """As a careless reward function does: years of backtracking, in which no other thread gets the interpreter."""
    happens()
    re.match(r"(a+)+$", "a" * 60 + "b")


def takes_too_much_memory(*_: Any) -> None:
    happens()
    torch.empty(2**50)


def leaves(*_: Any) -> None:
    happens()
    sys.exit(0)


def loses_a_data_worker(*_: Any) -> None:
    happens()
    list(torch.utils.data.DataLoader(DiesAlone(), num_workers=1))


class DiesAlone(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def spoils_the_logits(engine: RolloutEngine, *_: Any) -> None:
    happens()
    model = engine._core.executor.driver_worker.model_runner.get_model()
    model.get_parameter("model.norm.weight").data.fill_(float("nan"))


def flips_a_token(engine: RolloutEngine, *_: Any) -> None:
    """In the update that the scheduler makes of the next output, after which it goes on with the flipped one."""
    happens()
    agreement = engine._agreement
    sampled = agreement.sampled

    def flipped(update: Any) -> None:
        agreement.sampled = sampled
        update.token_ids[update.request_ids.index(REQUEST)] ^= 1
        sampled(update)

    agreement.sampled = flipped


def skips_a_step(engine: RolloutEngine, *_: Any) -> None:
    happens()
    engine._core.scheduler.schedule()


def drops_a_request(engine: RolloutEngine, *_: Any) -> None:
    happens()
    engine._core.scheduler.finish_requests(REQUEST, RequestStatus.FINISHED_ABORTED)


def takes_another_seed(engine: RolloutEngine, *_: Any) -> None:
    happens()
    engine.config = replace(engine.config, seed=1)


def builds_with_another_config() -> None:
    build = RolloutEngine.__init__

    def with_another_seed(engine: RolloutEngine, model: str, config: RolloutConfig) -> None:
        happens()
        build(engine, model, replace(config, seed=1))

    RolloutEngine.__init__ = with_another_seed


def fills_the_disk(*_: Any) -> None:
    """From now on the kernel takes no more than 64 KiB a file from this process, and then fails the write."""
    happens()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))


def kills_the_whole_job(*_: Any) -> None:
    """Launcher and all ranks at once: nobody is left to clean up."""
    import psutil

    happens()
    launcher = psutil.Process(os.getppid())
    ranks = launcher.children(recursive=True)
    for process in [launcher, *(rank for rank in ranks if rank.pid != os.getpid())]:
        process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Callable[[int], None]] = {
    "exception in execute": lambda step: in_decoding(step, execution, raises("execute")),
    "exception in sample": lambda step: in_decoding(step, sampling, raises("sample")),
    "exception in schedule": lambda step: in_decoding(step, scheduling, raises("schedule")),
    # The first sync proves its plan with one load more than the others.
    "exception in weight copy": lambda step: before(PlannedSync, "load", step + 1, raises("weight copy")),
    "exception in reward": lambda step: before(Scoring, "finish", step, raises("reward")),
    "exception in backward": lambda step: before(
        trainers.loop, "optimize", step, lambda *_: before(Accelerator, "backward", 0, raises("backward"))
    ),
    "SIGKILL of the rank": lambda step: in_decoding(step, execution, sends(signal.SIGKILL, os.getpid)),
    "SIGSTOP of the rank": lambda step: in_decoding(step, execution, sends(signal.SIGSTOP, os.getpid)),
    "SIGTERM of the rank": lambda step: in_decoding(step, execution, sends(signal.SIGTERM, os.getpid)),
    "SIGKILL of the launcher": lambda step: in_decoding(step, execution, sends(signal.SIGKILL, os.getppid)),
    "SIGTERM of the launcher": lambda step: in_decoding(step, execution, sends(signal.SIGTERM, os.getppid)),
    "Ctrl-C": lambda step: in_decoding(step, execution, sends(signal.SIGINT, os.getppid)),
    "SIGKILL of everybody": lambda step: in_decoding(step, execution, kills_the_whole_job),
    "sys.exit(0) in reward": lambda step: before(Scoring, "finish", step, leaves),
    "out of memory": lambda step: in_decoding(step, execution, takes_too_much_memory),
    "step that never ends": lambda step: in_decoding(step, execution, hangs),
    "reward that never returns": lambda step: before(Scoring, "finish", step, hangs),
    "reward that holds the interpreter": lambda step: before(Scoring, "finish", step, hangs_with_the_lock),
    "data worker that dies": lambda step: before(Scoring, "finish", step, loses_a_data_worker),
    "NaN logits": lambda step: in_decoding(step, execution, spoils_the_logits),
    "flipped token": lambda step: in_decoding(step, taking_output, flips_a_token),
    "skipped step": lambda step: in_decoding(step, scheduling, skips_a_step),
    "dropped request": lambda step: in_decoding(step, scheduling, drops_a_request),
    "another seed": lambda step: before(RolloutEngine, "generate", step, takes_another_seed),
    "another config": lambda step: builds_with_another_config(),
    "full disk": lambda step: before(trainers.loop, "export_policy", 0, fills_the_disk),
    "none": lambda step: None,
}


def main(config: PPOConfig) -> None:
    name, rank, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if int(os.environ["RANK"]) == rank:
        FAULTS[name](step)
    train_ppo(config)


if __name__ == "__main__":
    run_cli(PPOConfig, main, sys.argv[5:])
