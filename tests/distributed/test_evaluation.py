"""Two ranks share the prompts of an evaluation: each is counted once, however they divide."""

import json
from math import comb
from pathlib import Path

import pytest

from tests.distributed import evaluation_worker
from tests.launch import launch

WORKER = Path(evaluation_worker.__file__)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("evaluation")
    done = launch([WORKER, folder], nproc=2, timeout_s=90)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("count", [5, 4, 1])
def test_each_prompt_counts_once_and_all_ranks_agree(ranks: list[dict], count: int) -> None:
    metrics = ranks[0][str(count)]["metrics"]
    # Worked out from the table: prompt p is right greedily if p is odd, has p + 1 tokens, and p of 4 samples are right.
    prompts = range(count)
    assert metrics["eval/prompts"] == count
    assert metrics["eval/accuracy"] == pytest.approx(sum(p % 2 for p in prompts) / count)
    assert metrics["eval/response_tokens_mean"] == pytest.approx(sum(p + 1 for p in prompts) / count)
    assert metrics["eval/truncated_fraction"] == pytest.approx(sum(p + 1 >= 4 for p in prompts) / count)
    assert metrics["eval/avg_at_k"] == pytest.approx(sum(p / 4 for p in prompts) / count)
    assert metrics["eval/pass_at_k"] == pytest.approx(sum(1 - comb(4 - p, 2) / comb(4, 2) for p in prompts) / count)
    first, second = (dict(rank[str(count)]["metrics"], **{"eval/seconds": 0}) for rank in ranks)
    assert first == second
    outcomes = ranks[0][str(count)]["outcomes"]
    assert [outcome["prompt"] for outcome in outcomes] == [f"prompt {p}" for p in prompts]
    assert outcomes == ranks[1][str(count)]["outcomes"]


def test_greedy_is_greedy_and_no_stream_is_a_training_steps(ranks: list[dict]) -> None:
    (_, greedy, seed), (_, sampled, other_seed) = ranks[0]["5"]["asked"]
    assert (greedy["temperature"], greedy["n"], greedy["top_k"], greedy["max_tokens"]) == (0.0, 1, 0, 9)
    assert (sampled["temperature"], sampled["n"], sampled["top_k"]) == (1.0, 4, 5)
    assert min(seed, other_seed) > 10**9  # of steps
    assert [rank["5"]["asked"][0][0] for rank in ranks] == [3, 2]
