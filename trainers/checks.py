"""Checks of a config against what it meets: the ranks that torchrun started, and a model's folder.

Imports neither torch, vllm nor transformers, like trainers.config.
"""

import json
import math
from pathlib import Path
from typing import Any

from trainers.config import EvaluateConfig, Experiment
from trainers.errors import ConfigError


def check_world(config: Experiment, world_size: int) -> None:
    """Check the keys that depend on how many ranks torchrun started.

    Raises:
        ConfigError: if tensor_parallel_size does not divide the world, or a step's prompts do not split evenly over
            the ranks, or a rank has fewer responses than minibatches.

    >>> from trainers.config import PPOConfig, RolloutConfig
    >>> check_world(PPOConfig(rollout=RolloutConfig(tensor_parallel_size=2)), world_size=1)
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: rollout.tensor_parallel_size is 2, which does not divide the world size of 1; start \
the script with torchrun --nproc_per_node=2 (or a multiple), or set rollout.tensor_parallel_size=1
    """
    size = config.rollout.tensor_parallel_size
    if size is not None and world_size % size:
        raise ConfigError(
            f"rollout.tensor_parallel_size is {size}, which does not divide the world size of {world_size}; start the "
            f"script with torchrun --nproc_per_node={size} (or a multiple), or set rollout.tensor_parallel_size=1"
        )
    if isinstance(config, EvaluateConfig):
        return  # its prompts need not split evenly, and nothing is trained
    algorithm = config.algorithm
    prompts, name = algorithm.prompts_per_step, algorithm.section
    if prompts % world_size:
        raise ConfigError(
            f"{name}.prompts_per_step is {prompts}, which {world_size} ranks cannot share evenly; set a multiple of "
            f"{world_size}, e.g. {name}.prompts_per_step={math.ceil(prompts / world_size) * world_size}"
        )
    responses = prompts // world_size * config.sampling.n
    if algorithm.minibatches > responses:
        raise ConfigError(
            f"{name}.minibatches is {algorithm.minibatches}, but each of {world_size} ranks has only {responses} "
            f"responses a step; lower {name}.minibatches or raise {name}.prompts_per_step"
        )


def is_local(path: str) -> bool:
    """Whether a model path means a folder of this machine rather than a hub name.

    >>> is_local("models/mine"), is_local("./mine"), is_local("some-org/some-model")
    (True, True, False)
    """
    return path.startswith((".", "/", "models/")) or Path(path).exists()


def check_model(config: Experiment, world_size: int = 1) -> None:
    """Check a local model's folder and config.json; a hub name passes unread (`trainers.prepare` reads it).

    Args:
        world_size: ranks of the job.

    Raises:
        ConfigError: if the folder or its config.json is missing; or as of `check_sizes`.
    """
    if is_local(config.model.path):
        check_sizes(config, _read_model_config(config.model.path), world_size)


def check_sizes(config: Experiment, model: dict[str, Any], world_size: int) -> None:
    """Hold the config against a model's own.

    vLLM gives each of `tp` ranks attention_heads / tp heads, and kv_heads / tp key-value heads or, where there are
    more ranks than key-value heads, a copy of one: then kv_heads has to divide tp.

    Args:
        model: what its config.json has.
        world_size: ranks of the job, taken for `tp` where rollout.tensor_parallel_size is None.

    Raises:
        ConfigError: if tensor parallelism does not divide its heads, or if rollout.max_model_len exceeds its positions.
    """
    model = dict(model.get("text_config", model))  # multimodal models nest the language model's numbers
    tp = config.rollout.tensor_parallel_size or world_size
    heads = model.get("num_attention_heads")
    kv_heads: int = model.get("num_key_value_heads") or heads or 1
    if heads is not None and (heads % tp or (kv_heads % tp and tp % kv_heads)):
        raise ConfigError(
            f"model.path is {config.model.path!r}: its {heads} attention heads and {kv_heads} key-value heads cannot "
            f"be split over a tensor_parallel_size of {tp}. Pad them with `python scripts/prepare_model.py "
            f"--tensor-parallel-size {tp} --source {config.model.path} --output FOLDER` and set model.path=FOLDER, or "
            "set rollout.tensor_parallel_size=1"
        )
    positions = model.get("max_position_embeddings")
    if any((model.get(key) or {}).get("factor") for key in ("rope_scaling", "rope_parameters")):
        positions = None  # stretched beyond them; how far is vLLM's to say
    if positions is not None and config.rollout.max_model_len > positions:
        raise ConfigError(
            f"rollout.max_model_len is {config.rollout.max_model_len}, but the model at {config.model.path!r} has "
            f"max_position_embeddings={positions}; lower rollout.max_model_len"
        )


def _read_model_config(path: str) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        what = "has no config.json" if file.parent.is_dir() else "is not a folder"
        raise ConfigError(
            f"model.path is {path!r}, which {what} (seen from {Path.cwd()}); make the default model with `make model` "
            "or `python scripts/prepare_model.py`, or give another local folder or a hub name"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
