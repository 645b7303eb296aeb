"""The only folder that imports vLLM, and the only one that knows its internals."""

import logging
import os

# Both are read once by vLLM: the engine must run in this very process, and its start-up log is not the user's.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
