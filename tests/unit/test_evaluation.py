"""pass@k against a count of all subsets, what the metrics leave out, and that every name is explained."""

import itertools
import json
import re
from pathlib import Path

import pytest

from trainers.config import EvaluationConfig
from trainers.errors import ConfigError
from trainers.evaluation import EVAL_SAMPLES_FILE, Outcome, eval_metrics, pass_at_k, write_outcomes

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_sets_of_k_that_hold_a_right_one(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        sets = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, sets)) / len(sets))


def outcome(score: float, sampled: list[float]) -> Outcome:
    return Outcome(0, "?", "7", "7", score, 3, True, sampled)


def test_what_counts_as_right_can_be_set():
    outcomes = [outcome(0.5, [0.5, 0.4]), outcome(0.4, [1.0, 0.5])]
    assert eval_metrics(outcomes, EvaluationConfig(n=2))["eval/accuracy"] == 0.0
    metrics = eval_metrics(outcomes, EvaluationConfig(n=2, right_at=0.5))
    assert (metrics["eval/accuracy"], metrics["eval/avg_at_k"], metrics["eval/pass_at_k"]) == (0.5, 0.75, 1.0)


def test_greedy_alone_has_no_sampled_figures():
    metrics = eval_metrics([outcome(1.0, [])], EvaluationConfig(temperature=0.0))
    assert metrics["eval/accuracy"] == 1.0 and not {"eval/avg_at_k", "eval/pass_at_k"} & metrics.keys()


def test_every_name_is_explained_in_the_docs():
    names = {*eval_metrics([outcome(1.0, [1.0, 0.0])], EvaluationConfig(n=2)), "eval/seconds"}
    assert names <= set(re.findall(r"^\| `([^`]+)`", PAGE, flags=re.MULTILINE))


def test_all_outcomes_are_written_with_their_step(tmp_path):
    write_outcomes(tmp_path, 0, [outcome(1.0, [])])
    write_outcomes(tmp_path, 5, [outcome(0.0, [1.0]), outcome(1.0, [0.0])])
    rows = [json.loads(line) for line in (tmp_path / EVAL_SAMPLES_FILE).read_text().splitlines()]
    assert [(row["step"], row["score"], row["sampled_scores"]) for row in rows] == [
        (0, 1.0, []),
        (5, 0.0, [1.0]),
        (5, 1.0, [0.0]),
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"every": 0}, "evaluation.every is 0; it must be at least 1"),
        ({"held_out": 1.0}, "evaluation.held_out is 1.0"),
        ({"held_out": -0.1}, "evaluation.held_out is -0.1"),
        ({"n": 2, "k": 3}, "evaluation.k is 3.*raise evaluation.n"),
        ({"every": 3}, "evaluation.every is 3.*set evaluation.held_out=0.1"),
        ({"held_out": 0.1, "split": "test"}, "evaluation.held_out is 0.1.*set one of the two"),
        ({"temperature": -1.0}, "evaluation.temperature is -1.0"),
        ({"prompts": 0}, "evaluation.prompts is 0"),
    ],
)
def test_what_cannot_be_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        EvaluationConfig(**given)
