"""Rewards by their names or import paths, and one response judged by all of them. Loads neither torch nor vllm.

A reward function of your own takes the response's text, the answer and a `Sample`, and returns a number:

    def short(response: str, answer: str, sample: Sample) -> float:
        return 1.0 if sample.tokens < 100 else 0.0

and is named in the config: `reward.functions: ["exact_number", "my_rewards.py:short"]`, `reward.weights: [1, 0.1]`.
"""

import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trainers import rewards
from trainers.config import BUILT_IN_REWARDS
from trainers.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """What a reward function may want to know beside the response's text and the answer.

    Attributes:
        prompt: the user's message, without the chat template.
        finished: True where the response ended by itself, False where a limit cut it.
        tokens: of the response, the stop token included; those that the policy sampled.
        turns: of a rollout with an environment: the policy's texts and the environment's by turns, the policy's last,
            which is also what the function takes as the response. () without an environment.
    """

    prompt: str
    finished: bool
    tokens: int
    turns: tuple[str, ...] = ()


RewardFunction = Callable[[str, str, Sample], float]
"""Of the response's text (without special tokens), the answer, and the rest: any finite number."""


@dataclass(frozen=True)
class Task:
    """One response to be judged."""

    response: str
    answer: str
    sample: Sample


@dataclass(frozen=True)
class Failed:
    """Why a response has no score: the function at fault, where it is known, and a traceback or a sentence."""

    function: str
    reason: str


def load_functions(paths: Sequence[str], key: str = "reward.functions") -> dict[str, Callable[..., Any]]:
    """Each function by its path, in order; the modules and files that they are in are run.

    Args:
        key: of the config that names them, for the messages.

    Raises:
        ConfigError: if a module or file cannot be imported, or has no such function.

    >>> functions = load_functions(["exact_number", "math:prod"])
    >>> functions["exact_number"]("It is 7.", "7", Sample("3+4?", finished=True, tokens=4))
    1.0
    """
    return {path: _built_in(path) if path in BUILT_IN_REWARDS else _load(path, key) for path in paths}


def judge(functions: dict[str, RewardFunction], task: Task) -> list[float] | Failed:
    """What each function says of one response, in order; the first that raises or gives no finite number ends it."""
    found = []
    for path, function in functions.items():
        try:
            value = float(function(task.response, task.answer, task.sample))
        except (Exception, SystemExit):
            return Failed(path, traceback.format_exc())
        if not math.isfinite(value):
            return Failed(path, f"it returned {value}")
        found.append(value)
    return found


def _built_in(name: str) -> RewardFunction:
    function = getattr(rewards, name)
    if name == "math_verify":
        rewards.load_math_verify()  # seconds of imports, which are no response's
    return lambda response, answer, _: function(response, answer)


def _load(path: str, key: str) -> Callable[..., Any]:
    where, _, name = path.rpartition(":")
    try:
        module = _load_file(Path(where).expanduser()) if where.endswith(".py") else _load_module(where)
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(
            f"{key} has {path!r}, but {where} cannot be imported (seen from {Path.cwd()}): "
            f"{type(error).__name__}: {error}"
        ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        there = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ConfigError(
            f"{key} has {path!r}, but {where} has no function {name}"
            + (f"; it has {', '.join(there)}" if there else "")
        )
    return function


def _load_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError("there is no such file")
    name = f"reward_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look it up there
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    here = os.getcwd()
    sys.path.append(here)  # torchrun puts the script's folder there, not the user's
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)
