"""The only folder that imports vLLM, and the only one that knows its internals."""

import logging
import os


def set_vllm_environment() -> None:
    """The engine must run in this very process, and vLLM's start-up log is not the user's.

    vLLM reads the first when an engine is built, the second when it is imported.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


set_vllm_environment()
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
