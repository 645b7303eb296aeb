"""Two replicas in one job: each generates its own prompts, however many and however long, and waits for nobody."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("replicas_worker.py")


def test_replicas_generate_on_their_own(small_vocabulary_model_path: Path, tmp_path: Path) -> None:
    done = launch([WORKER, small_vocabulary_model_path, tmp_path], nproc=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    # 2 prompts x 2 samples x 4 tokens; 5 x 2 x 12.
    assert [(result["rows"], result["tokens"]) for result in results] == [(4, 16), (10, 120)]
    assert [result["metrics"]["rollout/generated_tokens"] for result in results] == [16, 120]
    assert [result["sync"] for result in results] == [{"(2,)": True, "(2, 1)": True}] * 2
    first, second = (result["balance"] for result in results)
    assert first["balanced"] == first["alone"], "who answers does not change what is said"
    assert second["alone"] != first["alone"], "the same prompts, by random streams of their own"
    assert second["balanced"] not in (second["alone"], first["alone"])
    assert (first["few"], second["few"]) == (2, 0)
    assert second["few_seconds"] < first["few_seconds"], "what it waited for the other does not count as its own"


@pytest.mark.slow
def test_replicas_of_two_ranks_take_shards_of_four(small_vocabulary_model_path: Path, tmp_path: Path) -> None:
    done = launch([WORKER, small_vocabulary_model_path, tmp_path, "2"], nproc=4, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [result["sync"] for result in results] == [{"(4,)": True, "(2, 2)": True}] * 4
    assert [result["rows"] for result in results] == [4, 4, 10, 10]
