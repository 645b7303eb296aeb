"""One process: what the KV cache takes of the memory, before and after the engine sleeps; to OUT/rank0.json.

python memory_worker.py MODEL OUT
"""

import ctypes
import json
import mmap
import sys
from pathlib import Path

import numpy as np
import psutil
import torch

from rollout import RolloutConfig, RolloutEngine, SamplingConfig

CONFIG = RolloutConfig(max_model_len=512, kv_cache_gib=0.25, enforce_eager=True, block_size=32, sleep="all")
SAMPLING = SamplingConfig(max_tokens=16, ignore_eos=True)
PROMPTS = [np.random.default_rng(number).integers(3, 500, 300).tolist() for number in range(64)]


def resident(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors that are in memory, by whole pages."""
    found = 0
    for start, length in {(each.untyped_storage().data_ptr(), each.untyped_storage().nbytes()) for each in tensors}:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        pages = (ctypes.c_ubyte * (-(-(start + length - first) // mmap.PAGESIZE)))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(start + length - first), pages) == 0
        found += sum(page & 1 for page in pages) * mmap.PAGESIZE
    return found


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    with RolloutEngine(model, CONFIG) as engine:
        caches = engine._core.executor.driver_worker.model_runner.kv_caches
        with engine.awake():
            engine.generate(PROMPTS, SAMPLING, seed=0)
            before, used, process_used = engine.digest(), resident(caches), psutil.Process().memory_info().rss
        asleep, process_asleep = resident(caches), psutil.Process().memory_info().rss
        with engine.awake():
            engine.generate(PROMPTS, SAMPLING, seed=0)
            again, used_again, process_again = engine.digest(), resident(caches), psutil.Process().memory_info().rss
        slept = engine.sleep()
        total = sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in caches}.values())
    result = {"used": used, "asleep": asleep, "used_again": used_again, "slept": slept, "total": total}
    result |= {"process": [process_used, process_asleep, process_again], "same_tokens": before == again}
    (out / "rank0.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
