"""What vLLM changes in the process that it moves into, put back: the trainer's state is the trainer's."""

import multiprocessing
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's default generators as they were found (CPU, and CUDA once it is in use)."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if _cuda_in_use() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


@contextmanager
def preserved_trainer_state() -> Iterator[None]:
    """Leave random state, default dtype, precision switches, threads, start method and environment as they were.

    vLLM's CPU worker seeds the global generators, replaces `torch.set_num_threads` by a no-op for the whole process,
    and its CPU platform writes LD_PRELOAD and LOCAL_WORLD_SIZE, which the trainer's data workers would inherit. Its
    import alone leaves a dozen variables behind.
    """
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    start_method = multiprocessing.get_start_method(allow_none=True)
    # vLLM's import and its CUDA attention change these two.
    matmul_precision, cudnn_sdp = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    with preserved_random_state():
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(matmul_precision)
            torch.backends.cuda.enable_cudnn_sdp(cudnn_sdp)
            # The first lock that is made settles it for good: a trainer's own choice afterwards would be an error.
            multiprocessing.set_start_method(start_method, force=True)
            _restore_environment(environment)


def _restore_environment(before: dict[str, str]) -> None:
    """Undo what differs, and nothing else: other threads may read the environment meanwhile, C code without a lock."""
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
