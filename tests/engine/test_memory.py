"""Outside of `awake` the KV cache takes no memory, and inside it works as before."""

import json
import mmap
from pathlib import Path

from tests.launch import launch

WORKER = Path(__file__).with_name("memory_worker.py")


def test_the_kv_caches_memory_goes_and_comes_back(small_vocabulary_model_path: Path, tmp_path: Path) -> None:
    done = launch([WORKER, small_vocabulary_model_path, tmp_path], nproc=None, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "rank0.json").read_text())
    assert result["used"] > 2**23 and result["used_again"] > 2**23
    assert result["asleep"] <= 2 * 2 * mmap.PAGESIZE, "at most the pages in which the tensors begin and end"
    assert result["slept"] >= result["total"] - 4 * mmap.PAGESIZE
    assert result["same_tokens"]
    process_used, process_asleep, process_again = result["process"]
    # The process has as much less, and more again: of a small cache the allocator's own moves are a part as well.
    assert process_used - process_asleep > 0.95 * result["used"]
    assert process_again - process_asleep > 0.95 * result["used_again"]
