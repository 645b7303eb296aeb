"""Responses come back to who gave the prompts; and once lengths are known, replicas have like amounts to do."""

import json
from pathlib import Path

from tests.launch import launch

WORKER = Path(__file__).with_name("balance_worker.py")


def test_two_replicas_answer_for_four_ranks(tmp_path: Path) -> None:
    done = launch([WORKER, tmp_path], nproc=4, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [rank["wrong"] for rank in ranks] == [0] * 4
    assert ranks[0]["tokens"] == ranks[1]["tokens"] and ranks[2]["tokens"] == ranks[3]["tokens"]
    total = sum(ranks[0]["tokens"][:1] + ranks[2]["tokens"][:1])
    for phase in (1, 2):
        busiest = max(ranks[0]["tokens"][phase], ranks[2]["tokens"][phase])
        assert busiest < 1.1 * total / 2, "after the first phase the lengths are known"
    *early, late = (rank["waits"] for rank in ranks)
    assert late["seconds"] < 0.5
    for waits in early:  # for whom the watch must not take the wait for a standstill
        assert 0.5 < waits["seconds"] < 10.0 and waits["beats"] > 10
