"""The fence around the engine: one call at a time, in the process that built it, and nothing of a call that broke."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rollout.failure import Watch


class Fence:
    """What the engine is doing, and who may ask it for what.

    Args:
        watch: hears of failures, since the other ranks may wait for this one.
        num_ranks: of the job.
    """

    def __init__(self, watch: Watch, num_ranks: int) -> None:
        self._watch, self._num_ranks = watch, num_ranks
        self._process = os.getpid()
        self._calling = threading.Lock()
        self._state = "idle"

    @property
    def state(self) -> str:
        """idle, closed, what is under way, or what broke it."""
        return self._state

    def check(self) -> None:
        """That the engine can be called now.

        Raises:
            RuntimeError: if not, or not in this process.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                f"the rollout engine belongs to process {self._process}; this is a fork of it, {os.getpid()}, without "
                "its threads and connections: generate in the process that built it"
            )
        if self._state != "idle":
            raise RuntimeError(f"the rollout engine is {self._state}: build a new one, or wait for the call under way")

    def check_open(self) -> None:
        """That the engine was not closed.

        Raises:
            RuntimeError: if it was.
        """
        if self._state == "closed":
            raise RuntimeError("the rollout engine is closed: build a new one")

    @contextmanager
    def one_caller(self) -> Iterator[None]:
        """One thread at a time, and only in a usable engine.

        Raises:
            RuntimeError: if another thread is inside, or as `check`.
        """
        self.check()
        if not self._calling.acquire(blocking=False):
            raise RuntimeError("the rollout engine is in use on another thread: call it from one thread at a time")
        try:
            yield
        finally:
            self._calling.release()

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Work that an error leaves half done: the engine is unusable then."""
        self._state = doing
        try:
            with self._watch.busy(doing):
                yield
        except BaseException as error:
            self._state = f"broken by {type(error).__name__} while {doing}"
            if self._num_ranks > 1:  # whatever the caller makes of it, the other ranks wait for this one
                self._watch.report(error)
            raise
        self._state = "idle"

    def close(self) -> bool:
        """From now on nothing is allowed; False if that was so before.

        Raises:
            RuntimeError: while a call is under way on another thread.
        """
        if self._state == "closed":
            return False
        if self._calling.locked():
            raise RuntimeError(f"the rollout engine is {self._state} on another thread: close it when that has ended")
        self._state = "closed"
        return True


@contextmanager
def no_backward(policy: nn.Module | None) -> Iterator[None]:
    """Inside, a backward pass through the policy, on whatever thread, is an error.

    The trainer and the engine share the cores or the GPU, the memory and the process group: their work takes turns.

    >>> layer = nn.Linear(1, 1)
    >>> with no_backward(layer):
    ...     layer(torch.ones(1)).sum().backward()
    Traceback (most recent call last):
    ...
    RuntimeError: a backward pass reached the policy while the rollout engine generates: ...
    """

    def refuse(parameter: torch.Tensor) -> None:
        raise RuntimeError(
            "a backward pass reached the policy while the rollout engine generates: train when generate has returned"
        )

    parameters = [] if policy is None else [each for each in policy.parameters() if each.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(refuse) for parameter in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
