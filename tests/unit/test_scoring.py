"""What a response is given: by which functions, with which weights, and when one of them fails."""

import time
from pathlib import Path

import numpy as np
import pytest

from rollout import RolloutBatch
from tests.tiny_tokenizer import tiny_tokenizer
from trainers.config import RewardConfig
from trainers.data import Example
from trainers.errors import ConfigError
from trainers.scoring import RewardError, Scorer

FUNCTIONS = """
from dataclasses import dataclass

@dataclass
class Found:
    text: str

def length(response, answer, sample):
    return len(Found(response).text)

def everything(response, answer, sample):
    assert (answer, sample.prompt, sample.finished, sample.tokens) == ("7", "3+4?", True, 5), sample
    return 0.25

def odd(response, answer, sample):
    if "boom" in response:
        raise KeyError("not there")
    if "exit" in response:
        raise SystemExit(3)
    return float("nan") if "nan" in response else "text" if "text" in response else 1.0
"""


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def functions(tmp_path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    return str(file)


def rollouts(tokenizer, texts: list[str], finished: list[bool], prompt_index: list[int]) -> RolloutBatch:
    responses = [tokenizer.encode(text) for text in texts]
    return RolloutBatch(
        prompt_ids=np.zeros(len(texts), np.int32),
        prompt_lengths=np.ones(len(texts), np.int32),
        response_ids=np.array([token for response in responses for token in response], np.int32),
        response_lengths=np.array([len(response) for response in responses], np.int32),
        logprobs=np.zeros(sum(map(len, responses)), np.float32),
        finished=np.array(finished),
        prompt_index=np.array(prompt_index, np.int32),
        version=0,
    )


def examples_of(*answers: str) -> list[Example]:
    return [Example([1], answer, "3+4?") for answer in answers]


def score_texts(tokenizer, config: RewardConfig, *texts: str):
    batch = rollouts(tokenizer, list(texts), [True] * len(texts), [0] * len(texts))
    with Scorer(config, tokenizer) as scorer:
        return scorer.score(batch, examples_of("7"))


@pytest.mark.parametrize("name", ["exact_number", "math_verify"])
@pytest.mark.parametrize(("require_finish", "expected"), [(True, [1, 0, 1, 0]), (False, [1, 0, 1, 1])])
def test_each_response_is_scored_by_the_answer_of_its_prompt(tokenizer, name, require_finish, expected):
    # Two prompts with answers 7 and 9, two samples each; the last response is right but was cut.
    batch = rollouts(
        tokenizer,
        ["is 7<|im_end|>", "is 9<|im_end|>", "is 9<|im_end|>", "is 9"],
        finished=[True, True, True, False],
        prompt_index=[0, 0, 1, 1],
    )
    scores = Scorer(RewardConfig(name, require_finish), tokenizer).score(batch, examples_of("7", "9"))
    assert scores.total.tolist() == expected
    assert scores.total.dtype == np.float32 and scores.total.shape == (4,)
    assert scores.metrics() == {"reward/failed": 0.0}


def test_special_tokens_are_not_part_of_the_response(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end 5|>"]})
    batch = rollouts(tokenizer, ["is 7<|end 5|>"], [True], [0])
    assert batch[0].response_ids.size == 5
    assert Scorer(RewardConfig(), tokenizer).score(batch, examples_of("7")).total.tolist() == [1.0]


def test_functions_are_weighted_and_each_is_logged(tokenizer, functions):
    paths = ["exact_number", f"{functions}:length", f"{functions}:everything"]
    config = RewardConfig(functions=paths, weights=[1.0, 0.5, -2.0])
    scores = score_texts(tokenizer, config, "is 7.", "is 8.")  # five tokens each
    assert scores.total.tolist() == [1 + 2.5 - 0.5, 2.5 - 0.5]
    assert scores.metrics() == {
        "reward/failed": 0.0,
        "reward/exact_number_mean": 0.5,
        "reward/length_mean": 5.0,
        "reward/everything_mean": 0.25,
    }


def test_a_module_of_the_working_directory_is_found(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def three(response, answer, sample):\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    config = RewardConfig(functions=["rewards_of_mine:three"])
    assert score_texts(tokenizer, config, "a").total.tolist() == [3.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_function_gives_0_and_is_counted(tokenizer, functions, workers):
    config = RewardConfig(functions=[f"{functions}:length", f"{functions}:odd"], on_error="zero", workers=workers)
    scores = score_texts(tokenizer, config, "fine", "boom", "a nan", "exit", "a text", "good")
    assert scores.total.tolist() == [5.0, 0.0, 0.0, 0.0, 0.0, 5.0]
    assert scores.failed.tolist() == [False, True, True, True, True, False]
    assert scores.parts["length"].tolist() == [4.0, 0.0, 0.0, 0.0, 0.0, 4.0]
    assert scores.metrics()["reward/failed"] == 4.0


@pytest.mark.parametrize("workers", [0, 1])
def test_or_it_ends_the_run_with_its_story(tokenizer, functions, workers):
    config = RewardConfig(functions=[f"{functions}:odd"], workers=workers)
    with pytest.raises(RewardError) as raised:
        score_texts(tokenizer, config, "fine", "boom")
    for part in ("mine.py:odd", "KeyError: 'not there'", "'boom'", "'3+4?'", "reward.on_error=zero"):
        assert part in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none_such_module:f", "No module named"),
        ("none/such.py:f", "there is no such file"),
        ("FILE:lenght", "has no function lenght; it has .*length"),
        ("BROKEN:f", "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_loaded_is_refused(tokenizer, functions, tmp_path, workers, path, words):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    path = path.replace("FILE", functions).replace("BROKEN", str(broken))
    with pytest.raises(ConfigError, match=rf"reward\.functions has .*{words}"):
        Scorer(RewardConfig(functions=[path], workers=workers), tokenizer)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"functions": ["length"]}, "give module:function"),
        ({"functions": ["a.py:"]}, "give module:function"),
        ({"functions": ["a:f", "b:f"]}, "two have one name"),
        ({"functions": ["a:f"], "weights": [1.0, 1.0]}, "2 numbers for 1"),
        ({"weights": [1.0]}, "1 numbers for 0"),
        ({"functions": ["a:f"], "weights": [float("nan")]}, "finite"),
        ({"workers": -1}, "reward.workers is -1"),
        ({"timeout_s": 0.0}, "reward.timeout_s is 0.0"),
    ],
)
def test_what_cannot_be_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        RewardConfig(**given)


def test_the_names_are_explained_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert "\n| `reward/failed`" in page and "\n| `reward/NAME_mean`" in page


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_begun_while_responses_come_are_those_of_all_at_once(tokenizer, functions, workers):
    config = RewardConfig(functions=[f"{functions}:length", f"{functions}:odd"], on_error="zero", workers=workers)
    texts = ["is 7.", "boom", "is 8.", "seven", "a nan"]
    batch, examples = rollouts(tokenizer, texts, [True] * len(texts), [0] * len(texts)), examples_of("7")
    with Scorer(config, tokenizer) as scorer:
        expected = scorer.score(batch, examples)
        for order in ([3, 0, 4, 2, 1], [0, 1], []):  # what ended while generate ran, in this order; the rest came last
            scoring = scorer.begin(examples)
            assert (scoring.on_step is None) == (workers == 0)
            for row in order if workers else []:
                scoring.on_step([(row, batch[row])])
                scoring.on_step([])
            wait_until(lambda scoring=scoring, order=order: workers == 0 or judged(scoring) == len(order))
            scores = scoring.finish(batch)
            assert scores.total.tobytes() == expected.total.tobytes()
            assert scores.failed.tolist() == expected.failed.tolist()
            assert {name: part.tolist() for name, part in scores.parts.items()} == {
                name: part.tolist() for name, part in expected.parts.items()
            }
            overlapped = scores.metrics().get("reward/overlapped_fraction")
            assert overlapped == (len(order) / len(batch) if workers else None)


def judged(scoring) -> int:
    scoring.on_step([])
    return scoring._judged


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
