"""Where a run starts: in a new folder from step 0, or in an old one from a checkpoint. Rank 0 decides."""

import dataclasses
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from rollout import World
from trainers.checkpoint import (
    CARRIED_FILE,
    FOLDER,
    About,
    damaged,
    load,
    on_main,
    read_about,
    remove,
    remove_leftovers,
    whole_checkpoints,
)
from trainers.checks import is_local
from trainers.cli import dump
from trainers.collection import SAMPLES_FILE
from trainers.config import Experiment
from trainers.dashboard import METRICS_FILE
from trainers.data import Example, PromptStream
from trainers.errors import ConfigError
from trainers.evaluation import EVAL_SAMPLES_FILE
from trainers.learner import Learner
from trainers.nodes import check_shared
from trainers.partial import Unfinished
from trainers.restart import find_restarted, note_launchers, restart_notes
from trainers.run_folder import create_run_folder, environment

ROWS_FILES = (METRICS_FILE, SAMPLES_FILE, EVAL_SAMPLES_FILE)
"""JSON lines with a "step" each, in order of steps."""

FREE_KEYS = (
    "ALGORITHM.steps",
    "checkpoint.",
    "evaluation.",
    "run.progress",
    "run.directory",
    "run.name",
    "run.private",
    "run.timeline_steps",
    "wandb.",
)
"""May differ from the checkpoint's. (What an evaluation holds out shows in the fingerprint of the prompts.)"""
FREE_PATHS = ("model.path", "data.source", "ALGORITHM.critic")
"""May differ where what lies there is the same, by its fingerprint."""
FREE_MEANS = (
    "model.gradient_checkpointing",
    "model.sharding",
    "model.reduce_gradients",
    "rollout.tensor_parallel_size",
    "rollout.max_num_seqs",
    "rollout.max_num_batched_tokens",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "rollout.block_size",
    "rollout.async_scheduling",
    "rollout.enforce_eager",
    "rollout.enable_prefix_caching",
    "rollout.sleep",
    "rollout.stall_timeout_s",
    "rollout.shutdown_timeout_s",
    "reward.workers",
    "reward.timeout_s",
    "environment.workers",
    "environment.timeout_s",
    "ALGORITHM.micro_batch_tokens",
)
"""May differ, as the number of ranks may: memory and speed; of the results, only the rounding."""

BINDING_ROLLOUT_KEYS = ("dtype", "head_dtype", "max_model_len", "balance", "seed", "simulate_step_ms")
"""Of `rollout`, those that change what is sampled; the others are among FREE_MEANS."""
HELD_OUT = "evaluation.held_out"

SAMPLED_BYTES, SAMPLES = 4096, 64  # of each file of weights, for its fingerprint


@dataclass(frozen=True)
class Start:
    """How the run starts; the same on all ranks.

    Attributes:
        folder: of the run.
        origin: fingerprints of what it begins with, for its checkpoints; empty if it neither writes nor reads any.
        is_new: True if the folder was made for this job.
        checkpoint: to go on from, and what it says of itself; None: from step 0.
    """

    folder: Path
    origin: dict[str, str]
    is_new: bool = True
    checkpoint: tuple[Path, About] | None = None

    @property
    def step(self) -> int:
        """The first to do."""
        return self.checkpoint[1].step if self.checkpoint else 0

    @property
    def wandb_id(self) -> str | None:
        """Of the run that goes on."""
        return self.checkpoint[1].wandb_id if self.checkpoint else None


def agreed_start(config: Experiment, examples: Sequence[Example], world: World) -> Start:
    """Rank 0's decision, made known to all; a collective.

    A job that torchrun has started again goes on in its run's folder, from the newest whole checkpoint, whatever
    `checkpoint.resume` says; without one it starts there anew.

    Raises:
        ConfigError: on every rank, if there is nothing whole to resume, the config differs in what matters, or a node
            does not see the folder that it has to write to.
    """
    check_shared(config, world)
    restarted = find_restarted(Path(config.run.directory))
    found: list[Any] = [None]

    def decide() -> None:
        found[0] = _decide(config, examples, world.size, restarted)

    on_main(decide)
    dist.broadcast_object_list(found, src=0)
    return found[0]


@contextmanager
def taken(start: Start, config: Experiment, world: World) -> Iterator[None]:
    """Inside, the run's folder is this job's alone; one that is resumed is made ready for it. A collective.

    Raises:
        ConfigError: on every rank, if another job writes there.
    """
    descriptors: list[int] = []

    def take() -> None:
        descriptors.append(_lock(start.folder))
        if not start.is_new:
            _reopen(start, config)

    try:
        on_main(take)
        if start.is_new:
            note_launchers(start.folder)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)  # and the lock with it, as it does when the process is killed


def restore(start: Start, learner: Learner, stream: PromptStream, seed: int) -> None:
    """Put everything back to where the checkpoint has it, and drop what was recorded after it. A collective.

    Nothing may draw from a random generator between this and the first step.

    Raises:
        ConfigError: on every rank that cannot read the checkpoint; nothing was dropped then.
    """
    if start.is_new:
        return
    if start.checkpoint is not None:
        load(*start.checkpoint, learner, seed)
        stream.position = start.checkpoint[1].position
    on_main(lambda: _cut_back(start.folder, start.step))
    note_launchers(start.folder)  # only now is the newest checkpoint the one that was asked for


def restore_carried(start: Start, unfinished: Unfinished, world: World) -> None:
    """Give each rank the responses back that it was carrying; no collective.

    Raises:
        ConfigError: if the checkpoint's cannot be read.
    """
    if start.checkpoint is None or not start.checkpoint[1].carried:
        return
    folder = start.checkpoint[0]
    try:
        unfinished.from_bytes((folder / CARRIED_FILE).read_bytes(), world.rank, world.size)
    except Exception as error:  # of many kinds: safetensors' own, a name or a number that does not fit
        raise damaged(folder, error) from error


def recorded(config: Experiment) -> str:
    """The config as config.yaml has it: a run started from that file is a new one."""
    return dump(dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume=None)))


def origin_of(config: Experiment, examples: Sequence[Example]) -> dict[str, str]:
    """Fingerprints, by config key, of what a run begins with: its prompts and its models.

    A hub's model is known by its name.
    """
    models = {"model.path": config.model.path}
    if critic := getattr(config.algorithm, "critic", None):
        models[f"{config.algorithm.section}.critic"] = critic
    return {"data.source": _of_prompts(examples)} | {key: _of_model(path) for key, path in models.items()}


def find_checkpoint(given: Path) -> Path:
    """The checkpoint that a folder is, or the newest whole one of a run's folder.

    Raises:
        ConfigError: if it is neither.
    """
    if given.parent.name == FOLDER or (given / "checkpoint.json").exists():
        return given
    if not given.is_dir():
        raise ConfigError(f"{given} is no folder (seen from {Path.cwd()}); give a run's folder or a checkpoint's")
    whole = whole_checkpoints(given)
    if not whole:
        raise ConfigError(f"{given} has no whole checkpoint in {FOLDER}/; a run writes them if checkpoint.every is set")
    return whole[-1]


def _decide(config: Experiment, examples: Sequence[Example], world_size: int, restarted: Path | None) -> Start:
    resume, every, name = config.checkpoint.resume, config.checkpoint.every, config.run.name
    origin = origin_of(config, examples) if resume is not None or every is not None else {}
    if restarted is not None:
        return _newest_of(restarted, config, origin, world_size)
    if config.run.progress:
        print("".join(f"{note}\n" for note in restart_notes(every)), end="", file=sys.stderr)
    if resume == "auto":
        assert name is not None  # Experiment has checked it
        folder = Path(config.run.directory) / name
        if folder.exists():
            return _newest_of(folder, config, origin, world_size)
    elif resume is not None:
        return _from_checkpoint(find_checkpoint(Path(resume)), config, origin, world_size)
    return Start(create_run_folder(config.run, config.algorithm.section, recorded(config)), origin)


def _newest_of(folder: Path, config: Experiment, origin: dict[str, str], world_size: int) -> Start:
    """Goes on in the run's folder: from its newest whole checkpoint, or anew where there cannot be one yet."""
    if whole := whole_checkpoints(folder):
        return _from_checkpoint(whole[-1], config, origin, world_size)
    _refuse_to_lose_steps(folder, config.checkpoint.every)
    return Start(folder, origin, is_new=False)


def _from_checkpoint(checkpoint: Path, config: Experiment, origin: dict[str, str], world_size: int) -> Start:
    about = read_about(checkpoint)
    folder = checkpoint.resolve().parent.parent
    if checkpoint.resolve().parent.name != FOLDER or not (folder / "config.yaml").exists():
        raise ConfigError(
            f"checkpoint.resume is {config.checkpoint.resume}: {checkpoint} does not lie in the {FOLDER}/ of a run's "
            "folder, where the run could go on; move it back there"
        )
    check_same(about, config, origin, world_size)
    return Start(folder, about.origin, is_new=False, checkpoint=(checkpoint, about))


def check_same(about: About, config: Experiment, origin: dict[str, str], world_size: int) -> None:
    """See that the run that goes on is the one that was stopped.

    Raises:
        ConfigError: naming each key that differs and may not, with both values.
    """
    name = config.algorithm.section
    if about.algorithm != name:
        raise ConfigError(f"the checkpoint is of a run of {about.algorithm}; go on with scripts/{about.algorithm}.py")
    before, now, defaults = (_flat(each) for each in (about.config, _as_json(config), _as_json(_defaults(config))))
    before = defaults | before  # a key that came after the checkpoint had its default then
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    free = tuple(key.replace("ALGORITHM", name) for key in FREE_KEYS + FREE_PATHS)
    means = [key for key in differing if key in {key.replace("ALGORITHM", name) for key in FREE_MEANS}]
    wrong = [key for key in differing if not key.startswith(free) and key not in means]
    others = [key for key in sorted(about.origin.keys() | origin.keys()) if about.origin.get(key) != origin.get(key)]
    change = {key: f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differing}
    accept = config.checkpoint.accept
    if unknown := [key for key in accept if key not in now]:
        raise ConfigError(f"checkpoint.accept has {unknown[0]!r}, which is no key; give section.key")
    lines = [change[key] for key in wrong if key not in accept]
    for key in others:
        because = f" ({change[HELD_OUT]})" if key == "data.source" and HELD_OUT in differing else ""
        lines.append(f"{key} ({now.get(key)!r}) holds something else than the run began with{because}")
    if lines:
        raise ConfigError(
            f"the checkpoint at step {about.step} cannot go on with another config: {'; '.join(lines)}. Set what it "
            "was, start a new run without checkpoint.resume, or name a setting that shall change in checkpoint.accept"
        )
    if about.step > config.algorithm.steps:
        raise ConfigError(
            f"{name}.steps is {config.algorithm.steps}, but the checkpoint has done {about.step}; raise {name}.steps"
        )
    if world_size != about.world_size:
        means.append(f"{world_size} ranks instead of {about.world_size}")
    if config.run.progress:
        for key in wrong:
            print(f"goes on as another run (checkpoint.accept): {change[key]}", file=sys.stderr)
    if means and config.run.progress:
        what = ", ".join(means)
        print(f"goes on with other means ({what}): the same run, but not to the last digit", file=sys.stderr)


def _refuse_to_lose_steps(folder: Path, every: int | None) -> None:
    """A run without a checkpoint starts anew only if it died before the first one was due, or never writes any."""
    if not (folder / "config.yaml").exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} exists and is no run's folder; choose another run.name")
    metrics = folder / METRICS_FILE
    done = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    if every is not None and done > every:
        raise ConfigError(
            f"{folder} has {done} steps and no whole checkpoint, though checkpoint.every is {every}: to start anew, "
            "move it away or choose another run.name"
        )


def _reopen(start: Start, config: Experiment) -> None:
    """The config and surroundings of what follows; what failed before keeps its story under another name."""
    folder = start.folder
    remove_leftovers(folder)
    written = folder / "config.yaml.part"
    written.write_text(recorded(config))
    written.rename(folder / "config.yaml")
    (folder / f"environment-{start.step}.json").write_text(json.dumps(environment(), indent=2) + "\n")
    failure = folder / "failure.json"
    if failure.exists():
        failure.rename(folder / f"failure-before-{start.step}.json")


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"another job writes to {folder}; wait for its end, or end it") from None
    return descriptor


def _cut_back(folder: Path, step: int) -> None:
    """Drop the rows from `step` on, and the checkpoints after it."""
    for name in ROWS_FILES:
        if (folder / name).exists():
            os.truncate(folder / name, _bytes_before(folder / name, step))
    for later in whole_checkpoints(folder):
        if read_about(later).step > step:
            remove(later)


def _bytes_before(file: Path, step: int) -> int:
    """Of the leading rows of earlier steps; a row that a crash cut short ends them."""
    size = 0
    with file.open("rb") as rows:
        for row in rows:
            try:
                earlier = row.endswith(b"\n") and json.loads(row)["step"] < step
            except (ValueError, KeyError, TypeError):
                earlier = False
            if not earlier:
                break
            size += len(row)
    return size


def _of_prompts(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        answer = example.answer.encode()
        digest.update(np.array([len(example.prompt_ids), len(answer), *example.prompt_ids], np.int64).tobytes())
        digest.update(answer)
    return f"sha256:{digest.hexdigest()}"


def _of_model(path: str) -> str:
    """By its config, and by pages of its weights here and there: another training of it differs everywhere."""
    if not is_local(path):
        return f"hub:{path}"
    digest = hashlib.sha256()
    folder = Path(path)
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(SAMPLED_BYTES, size // SAMPLES)):
                content.seek(start)
                digest.update(content.read(SAMPLED_BYTES))
    return f"sha256:{digest.hexdigest()}"


def _as_json(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _defaults(config: Experiment) -> Experiment:
    return type(config)()


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    try:
        return {f"{section}.{key}": value for section, keys in config.items() for key, value in keys.items()}
    except AttributeError as error:
        raise damaged(Path("checkpoint.json"), error) from error
