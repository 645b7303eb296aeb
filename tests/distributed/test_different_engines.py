"""Ranks that build their engines from something else are refused together, before they wait for each other."""

import json
from pathlib import Path

from tests.launch import launch

WORKER = Path(__file__).with_name("different_engines_worker.py")


def test_ranks_that_were_given_something_else_are_told_at_once(tmp_path: Path) -> None:
    done = launch([WORKER, tmp_path], nproc=2, timeout_s=60)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        assert list(rank) == ["tensor_parallel_size", "balance", "seed", "model"]
        for name, told in rank.items():
            assert told["message"].startswith("rank 1 builds its engine from"), name
            assert told["message"] == ranks[0][name]["message"]
            assert told["seconds"] < 10, name
