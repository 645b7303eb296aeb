"""The random generators of a process as JSON, and back: Python's, numpy's, torch's (CPU, this rank's GPU)."""

import base64
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """All of this process's global generators, JSON-ready; draws nothing.

    >>> state = random_state()
    >>> drawn = random.random(), np.random.rand(), torch.rand(1)
    >>> set_random_state(state)
    >>> drawn == (random.random(), np.random.rand(), torch.rand(1))
    True
    """
    version, words, gauss = random.getstate()
    of_numpy: dict[str, Any] = np.random.get_state(legacy=False)
    inner = of_numpy["state"]
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": of_numpy | {"state": {"key": inner["key"].tolist(), "pos": int(inner["pos"])}},
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to where `random_state` found them.

    A GPU's generator stays where it is if the state has none, or if there is no GPU.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if the state has another form.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    inner = state["numpy"]["state"]
    key = np.array(inner["key"], np.uint32)
    np.random.set_state(dict(state["numpy"]) | {"state": {"key": key, "pos": inner["pos"]}})
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def derive_random_state(seed: int, step: int, rank: int) -> None:
    """Seed the generators of a rank whose states were never saved: by run, step and rank, and by nothing else."""
    of_python, of_numpy, of_torch = np.random.SeedSequence([seed, step, rank]).generate_state(3).tolist()
    random.seed(of_python)
    np.random.seed(of_numpy)
    torch.manual_seed(of_torch)  # the GPU's too


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
