"""Checkpoints: all that a run needs to go on as if it had never stopped; written whole or not at all.

    RUN/checkpoints/step-000040/          after 40 steps
        checkpoint.json                   an `About`: step, prompts drawn, ranks, config, the files and their sizes
        random.json                       the random generators of every rank
        carried.safetensors               responses that are carried to the next step, where there are any
        tensors/*.safetensors             what is trained of policy and critic, and the optimizer, by
                                          torch.distributed.checkpoint

Every rank writes its part of the tensors into step-000040.part, so the folder has to be on a disk that all ranks see.
All of it is on the disk before the folder gets its name, and only then do older ones go. What carries another name is
no checkpoint: the next save, or the next start, removes it.

Nothing here is a pickle. Tensors are safetensors, the rest is JSON: reading a checkpoint runs none of its code.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from trainers.errors import ConfigError
from trainers.learner import Learner
from trainers.random_state import derive_random_state, random_state, set_random_state

FOLDER, ABOUT_FILE, RANDOM_FILE, TENSORS = "checkpoints", "checkpoint.json", "random.json", "tensors"
CARRIED_FILE = "carried.safetensors"
PART = ".part"
FORMAT = 1
FILE_BYTES = 2**30  # of one file of tensors: it is in memory as a whole while it is written
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself, beside the tensors and the random generators.

    Attributes:
        step: steps done, and the number of the next one. Learning rates and the engine's version follow from it.
        position: prompts drawn by all ranks, `PromptStream.position`.
        world_size: ranks that wrote it.
        algorithm: the name of its section.
        config: the resolved config.
        origin: by config key, a fingerprint of what the run began with (`trainers.resume.origin_of`).
        wandb_id: of the run on wandb; None without.
        scaler: of fp16's loss scaling; None without.
        updated: False if the optimizer has made no update yet, and has no state.
        files: of the tensors, with their sizes in bytes.
        carried: bytes of CARRIED_FILE; 0 where nothing is carried.
    """

    step: int
    position: int
    world_size: int
    algorithm: str
    config: dict[str, Any]
    origin: dict[str, str]
    wandb_id: str | None = None
    scaler: dict[str, Any] | None = None
    updated: bool = True
    files: dict[str, int] = field(default_factory=dict)
    carried: int = 0


def save(run_folder: Path, about: About, learner: Learner, keep: int, private: bool, carried: bytes = b"") -> Path:
    """Write a checkpoint of this moment, then remove the oldest; all ranks call it together.

    Args:
        about: as rank 0 has it; the other ranks' is not looked at. `files`, `scaler`, `updated` and `carried` are
            filled in here.
        keep: whole checkpoints to have afterwards, this one included.
        private: True gives the folder mode 0700, else the umask decides.
        carried: all ranks' responses in the making (`trainers.partial`), as rank 0 has them.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if one of them could not write (a full disk, say). The checkpoints before are
            as they were.
    """
    final = run_folder / FOLDER / f"step-{about.step:06d}"
    part = final.with_name(final.name + PART)
    randoms: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(randoms, random_state())  # before anything here could draw
    try:
        on_main(lambda: _make_part(part, private))
        files = write_tensors(part / TENSORS, learner)
        scaler = learner.accelerator.scaler
        whole = replace(
            about,
            files=files,
            scaler=scaler.state_dict() if scaler is not None else None,
            updated=_has_state(learner.optimizer),
            carried=len(carried),
        )
        on_main(lambda: _finish(part, final, whole, {str(rank): state for rank, state in enumerate(randoms)}, carried))
        on_main(lambda: _keep_newest(run_folder, keep))
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint {final} was not written: {_reason(error)}. Those before it are whole; make room on the "
            f"disk, and go on with checkpoint.resume={run_folder}"
        ) from error
    return final


def load(folder: Path, about: About, learner: Learner, seed: int) -> None:
    """Put policy, optimizer and random generators back; all ranks call it together, any number of them.

    A rank that the checkpoint does not know seeds its generators from (seed, step, rank).

    Args:
        about: `read_about(folder)`.
        learner: freshly made for the same model.
        seed: run.seed.

    Raises:
        ConfigError: if a file is damaged, or the tensors are of another model.
    """
    randoms = _read_json(folder / RANDOM_FILE)
    tensors, put_back = _state(learner.policy, _plain(learner.optimizer), about.updated)
    read_tensors(folder, tensors)
    put_back()
    rank = str(dist.get_rank())
    try:
        if learner.accelerator.scaler is not None and about.scaler is not None:
            learner.accelerator.scaler.load_state_dict(about.scaler)
        if rank in randoms:
            set_random_state(randoms[rank])
        else:
            derive_random_state(seed, about.step, int(rank))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise damaged(folder, error) from error


def write_tensors(folder: Path, learner: Learner) -> dict[str, int]:
    """Each rank writes its part, synced to the disk; the files of all ranks with their sizes.

    Raises:
        CheckpointException, RuntimeError: if a rank could not write, or wrote where rank 0 does not see it.
    """
    tensors, _ = _state(learner.policy, _plain(learner.optimizer), _has_state(learner.optimizer))
    writer = dcp.HuggingFaceStorageWriter(str(folder), _file_of(tensors), save_distributed=True)
    dcp.save(tensors, storage_writer=writer)
    ours = f"shard-{dist.get_rank() + 1:05d}-"
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, {file.name: file.stat().st_size for file in folder.glob(f"{ours}*")})
    files = {name: size for of_rank in everyones for name, size in of_rank.items()}

    def all_seen() -> None:
        seen = {file.name: file.stat().st_size for file in folder.iterdir()}
        if seen != files:
            missing = sorted(files.keys() - seen.keys())
            raise OSError(f"rank 0 does not see {missing or sorted(seen)}: run.directory has to be shared by all ranks")

    on_main(all_seen)
    return files


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the tensors in place with those of the same names; a collective where torch.distributed is initialised.

    Raises:
        ConfigError: if one is missing, has another shape, or a file is damaged.
    """
    try:
        dcp.load(
            tensors,
            storage_reader=dcp.HuggingFaceStorageReader(str(folder / TENSORS)),
            no_dist=not dist.is_initialized(),
        )
    except (CheckpointException, Exception) as error:
        raise damaged(folder, error) from error


def whole_checkpoints(run_folder: Path) -> list[Path]:
    """A run's checkpoints whose files are all there in full, oldest first."""
    found = []
    for folder in sorted((run_folder / FOLDER).glob("step-*"), key=lambda folder: (len(folder.name), folder.name)):
        if re.fullmatch(r"step-\d+", folder.name):
            try:
                read_about(folder)
            except ConfigError:
                continue
            found.append(folder)
    return found


def read_about(folder: Path) -> About:
    """What the checkpoint says of itself.

    Raises:
        ConfigError: if it is none, was made by another version of this library, or lacks a file.
    """
    content = _read_json(folder / ABOUT_FILE)
    version = content.pop("format", None)
    if version != FORMAT:
        raise ConfigError(f"{folder} has the format {version}; this version of the library reads {FORMAT}")
    try:
        about = About(**content)
        for key in fields(About):
            _require(isinstance(getattr(about, key.name), _TYPES[key.name]), f"{key.name} has the wrong type")
        _require(min(about.step, about.position) >= 0 < about.world_size, "a number is out of range")
        _require(bool(about.files), "it names no files")
        for name, size in about.files.items():
            _require(re.fullmatch(r"[\w.-]+\.safetensors", name) is not None, f"{name!r} is no file of tensors")
            _require((folder / TENSORS / name).stat().st_size == size, f"{name} is cut short")
        _require((folder / RANDOM_FILE).is_file(), f"{RANDOM_FILE} is missing")
        if about.carried:
            _require((folder / CARRIED_FILE).stat().st_size == about.carried, f"{CARRIED_FILE} is cut short")
    except (TypeError, ValueError, OSError) as error:
        raise damaged(folder, error) from error
    return about


def remove(folder: Path) -> None:
    """Take a checkpoint away; it loses its name first, so that half of it never looks whole."""
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    folder.rename(part)
    shutil.rmtree(part)


def remove_leftovers(run_folder: Path) -> None:
    """What a save or a removal left that was interrupted."""
    for part in (run_folder / FOLDER).glob(f"step-*{PART}"):
        shutil.rmtree(part)


def on_main(work: Callable[[], Any]) -> None:
    """Do it on rank 0; if it fails there, raise the same on all ranks. A collective.

    Raises:
        ConfigError: if it raised one.
        RuntimeError: naming what else it raised.
    """
    failed: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            failed = [(isinstance(error, ConfigError), _reason(error))]
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        is_users, reason = failed[0]
        raise ConfigError(reason) if is_users else RuntimeError(reason)


def damaged(folder: Path, error: BaseException) -> ConfigError:
    """The error for a checkpoint that cannot be read."""
    return ConfigError(
        f"the checkpoint {folder} cannot be read, it is damaged or of another model: {_reason(error)}. Go on from "
        "another: checkpoint.resume=RUN/checkpoints/step-NUMBER"
    )


def write_synced(file: Path, content: Any) -> None:
    """Write JSON, and have it on the disk."""
    with file.open("w") as stream:
        json.dump(content, stream, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())


def _state(
    policy: nn.Module, optimizer: torch.optim.Optimizer, updated: bool
) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """All tensors of both by name, to be written, or filled in place; and what takes them over after that.

    What is frozen (under adapters) is the first model's, and is left out. A weight that two names share (a tied head)
    comes once. The optimizer's numbers that are no tensors (rates, betas)
    are the config's, and stay. One that has made no update is left alone: asked for a state, torch would make one, and
    count an update.
    """
    of_model: dict[str, Any] = get_model_state_dict(policy, options=FLAT)
    of_optimizer: dict[str, Any] = get_optimizer_state_dict(policy, optimizer, options=FLAT) if updated else {}
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in policy.named_buffers()}
    tensors = {f"policy.{name}": tensor for name, tensor in of_model.items() if name in names}
    tensors |= {f"optimizer.{name}": value for name, value in of_optimizer.items() if isinstance(value, torch.Tensor)}

    def put_back() -> None:
        set_model_state_dict(policy, of_model, options=FLAT)
        if updated:
            taken = {name: tensors.get(f"optimizer.{name}", value) for name, value in of_optimizer.items()}
            set_optimizer_state_dict(policy, optimizer, taken, options=FLAT)

    return tensors, put_back


def _has_state(optimizer: torch.optim.Optimizer) -> bool:
    return bool(_plain(optimizer).state)


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _file_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """By name, the number of the file, from 1: no more than FILE_BYTES in each where a tensor is not larger itself."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += size
    return numbers


def _make_part(part: Path, private: bool) -> None:
    mode = 0o700 if private else 0o777
    part.parent.mkdir(mode, exist_ok=True)
    remove_leftovers(part.parent.parent)
    part.mkdir(mode)
    (part / TENSORS).mkdir()


def _finish(part: Path, final: Path, about: About, randoms: dict[str, Any], carried: bytes) -> None:
    """Write the rest, have everything on the disk, and only then give it its name."""
    if carried:
        with (part / CARRIED_FILE).open("wb") as stream:
            stream.write(carried)
            stream.flush()
            os.fsync(stream.fileno())
    write_synced(part / RANDOM_FILE, randoms)
    write_synced(part / ABOUT_FILE, {"format": FORMAT} | asdict(about))
    _sync_folder(part / TENSORS)
    _sync_folder(part)
    if final.exists():  # damaged, else the run would have gone on from it
        shutil.rmtree(final)
    part.rename(final)
    _sync_folder(final.parent)


def _keep_newest(run_folder: Path, keep: int) -> None:
    for folder in whole_checkpoints(run_folder)[:-keep]:
        remove(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        _require(isinstance(content, dict), "no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file.parent, error) from error
    return content


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _reason(error: BaseException) -> str:
    """One line; of an error that other ranks told of, theirs."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_reason(failure)}" for rank, (failure, _) in error.failures.items())
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


_TYPES: dict[str, Any] = {
    "step": int,
    "position": int,
    "world_size": int,
    "algorithm": str,
    "config": dict,
    "origin": dict,
    "wandb_id": str | None,
    "scaler": dict | None,
    "updated": bool,
    "files": dict,
    "carried": int,
}
