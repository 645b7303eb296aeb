"""A process that scores responses, or answers for an environment, one at a time, until its rank is gone.

Loads neither torch nor vllm.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from trainers.errors import ConfigError
from trainers.reward_functions import load_functions

PR_SET_PDEATHSIG = 1


def serve(
    paths: list[str], key: str, judge: Callable[[dict[str, Any], Any], Any], rank_pid: int, connection: Connection
) -> None:
    """Load the functions, say None (or what is wrong), then answer each task that comes with `judge`'s verdict.

    Args:
        paths: of the functions.
        key: of the config that names them.
        judge: of the functions by their paths, and a task; itself found by its name, here and in the rank.
        rank_pid: of the process that started this one; when it ends, by whatever, this one is killed.
        connection: to it.
    """
    # Ctrl-C reaches the whole terminal; the rank decides what becomes of it, and of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(rank_pid)
    try:
        functions = load_functions(paths, key)
    except ConfigError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the rank has closed its end
            return
        connection.send(judge(functions, task))


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, a hung one too; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(1)
