"""What of a process the trainer counts on, as a value to be compared."""

import faulthandler
import hashlib
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import numpy as np
import torch


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def trainer_state() -> dict[str, Any]:
    """By name. Not in it: vLLM's factory of log records, which adds a field to those of the one before it."""
    root = logging.getLogger()
    return {
        "python": digest(np.array([hash(random.getstate())])),
        "numpy": digest(np.random.get_state()[1]),
        "torch": digest(torch.get_rng_state().numpy()),
        "cuda": digest(torch.cuda.get_rng_state().numpy()) if torch.cuda.is_initialized() else None,
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "set_num_threads": torch.set_num_threads.__module__,
        "cores": os.sched_getaffinity(0),
        "environment": dict(os.environ),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "faulthandler": faulthandler.is_enabled(),
        "switch_interval": sys.getswitchinterval(),
        "start_method": multiprocessing.get_start_method(allow_none=True),
        "warnings": list(warnings.filters),
        "logging": (list(root.handlers), root.level, logging.root.manager.disable),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, by name; of the environment and the signals also which."""
    names = [name for name in before if before[name] != after[name]]
    for name in ("environment", "signals"):
        was, now = before[name], after[name]
        names += [f"{name}: {key}" for key in was.keys() | now.keys() if was.get(key) != now.get(key)]
    return names
