"""Environments of the config: texts in the model's template and back, in time, and told of where they fail."""

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rollout import CUT, Rollout, RolloutBatch
from tests.tiny_tokenizer import tiny_tokenizer
from trainers.calculator import calculator
from trainers.config import EnvironmentConfig, RewardConfig
from trainers.conversation import Episode
from trainers.data import Example
from trainers.environment import Dialogue, Environment, EnvironmentFailed
from trainers.errors import ConfigError
from trainers.scoring import Scorer

FUNCTIONS = """
import sys, time

def echo(episode):
    last = episode.turns[-1]
    if last == "boom":
        raise KeyError("not there")
    if last == "slow":
        time.sleep(1000)
    if last == "odd":
        return 7
    if last == "modules":
        return str(any(name in sys.modules for name in ("torch", "vllm", "transformers")))
    return None if last == "end" else f"{episode.prompt} {episode.answer} {len(episode.turns)} {last}"

def last_turn(response, answer, sample):
    assert sample.turns == ("ask", "= 408", "is 408") and response == "is 408", (response, sample)
    return float(sample.tokens)
"""
OPENS = "<|im_start|>user\n"
CLOSES = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def functions(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return f"{tmp_path}/mine.py"


def rollout_of(tokenizer, turns: list[str], dialogue: Dialogue) -> Rollout:
    """A response of the policy's and the environment's turns, each of the policy's ended by <|im_end|>."""
    ids: list[int] = []
    generated: list[bool] = []
    for number, text in enumerate(turns):
        new = dialogue.wrap(text, ids[-1]) if number % 2 else tokenizer.encode(text + "<|im_end|>")
        ids, generated = [*ids, *new], [*generated, *[number % 2 == 0] * len(new)]
    zeros = np.zeros(len(ids), np.float32)
    return Rollout(np.array([1], np.int32), np.array(ids, np.int32), zeros, "stop", 0, 0, np.array(generated))


def test_an_observation_is_a_message_of_the_template(tokenizer):
    dialogue = Dialogue(tokenizer, "user")
    end = tokenizer.encode("<|im_end|>")[0]
    assert tokenizer.decode(dialogue.wrap("= 408", end)) == f"\n{OPENS}= 408{CLOSES}"
    assert tokenizer.decode(dialogue.wrap("= 408", 65)) == f"<|im_end|>\n{OPENS}= 408{CLOSES}"
    # As the template itself would put it.
    messages = [("user", "12*34?"), ("assistant", "ask"), ("user", "= 408")]
    chat = [{"role": role, "content": content} for role, content in messages]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert whole.endswith("ask<|im_end|>" + tokenizer.decode(dialogue.wrap("= 408", end)))


@pytest.mark.parametrize("role", ["user", "none"])
def test_turns_come_back_as_they_were_said(tokenizer, role):
    dialogue = Dialogue(tokenizer, role)
    turns = ["ask", "= 408", "really?", "yes\n", "is 408"]
    assert dialogue.texts(rollout_of(tokenizer, turns, dialogue)) == tuple(turns)


def test_without_a_template_the_text_stands_as_it_is():
    tokenizer = tiny_tokenizer(chat_template=None)
    assert tokenizer.decode(Dialogue(tokenizer, "user").wrap("= 408", 65)) == "= 408"


def test_a_template_that_refuses_the_role_is_found_before_anything_starts():
    tokenizer = tiny_tokenizer("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
                               "{% endif %}{{ m.content }}{% endfor %}")  # fmt: skip
    with pytest.raises(ConfigError, match="environment.role=tool.*no tools.*set environment.role=user"):
        Environment(EnvironmentConfig(function="trainers.calculator:calculator", role="tool"), tokenizer)


def observed(tokenizer, config: EnvironmentConfig, *texts: str):
    with Environment(config, tokenizer) as environment:
        rollouts = [rollout_of(tokenizer, [text], environment.dialogue) for text in texts]
        found, failed = environment._observe(rollouts, [Example([1], "7", "3+4?")])
        return [tokenizer.decode(each) if isinstance(each, list) else each for each in found], failed


@pytest.mark.parametrize("workers", [0, 2])
def test_the_function_is_asked_about_each_conversation(tokenizer, functions, workers):
    config = EnvironmentConfig(function=f"{functions}:echo", workers=workers, role="none")
    found, failed = observed(tokenizer, config, "one", "end", "two")
    assert found == ["3+4? 7 1 one", None, "3+4? 7 1 two"] and failed == 0


def test_workers_load_neither_torch_nor_vllm(tokenizer, functions):
    assert "torch" in sys.modules
    config = EnvironmentConfig(function=f"{functions}:echo", workers=1, role="none")
    assert observed(tokenizer, config, "modules") == (["False"], 0)


def test_slow_and_failing_environments_are_bounded_and_counted(tokenizer, functions):
    config = EnvironmentConfig(f"{functions}:echo", role="none", workers=2, timeout_s=1.0, on_error="cut")
    start = time.monotonic()
    found, failed = observed(tokenizer, config, "boom", "one", "slow", "odd", "two")
    assert time.monotonic() - start < 30
    assert found == [CUT, "3+4? 7 1 one", CUT, CUT, "3+4? 7 1 two"] and failed == 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("text", "words"), [("boom", "KeyError: 'not there'"), ("odd", "it returned 7")])
def test_or_they_end_the_run_with_their_story(tokenizer, functions, workers, text, words):
    config = EnvironmentConfig(function=f"{functions}:echo", workers=workers)
    with pytest.raises(EnvironmentFailed) as raised:
        observed(tokenizer, config, "one", text)
    for part in ("mine.py:echo failed", words, "'3+4?'", repr(text), "environment.on_error=cut"):
        assert part in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_loaded_is_refused(tokenizer, functions, workers):
    config = EnvironmentConfig(function=f"{functions}:ecco", workers=workers)
    with pytest.raises(ConfigError, match="environment.function has .* has no function ecco; it has echo"):
        Environment(config, tokenizer)


def test_rewards_see_the_last_turn_and_all_of_them(tokenizer, functions):
    dialogue = Dialogue(tokenizer, "user")
    rollout = rollout_of(tokenizer, ["ask", "= 408", "is 408"], dialogue)
    batch = RolloutBatch(
        prompt_ids=rollout.prompt_ids,
        prompt_lengths=np.ones(1, np.int32),
        response_ids=rollout.response_ids,
        response_lengths=np.array([len(rollout.response_ids)], np.int32),
        logprobs=rollout.logprobs,
        finished=np.array([True]),
        prompt_index=np.zeros(1, np.int32),
        version=0,
        generated=rollout.generated,
    )
    config = RewardConfig(functions=["exact_number", f"{functions}:last_turn"])
    with Scorer(config, tokenizer, dialogue=dialogue) as scorer:
        # exact_number; "ask", "is 408" and two stop tokens.
        assert scorer.score(batch, [Example([1], "408", "12*34?")]).total.tolist() == [1 + 3 + 6 + 2]


@pytest.mark.parametrize(
    ("expression", "value"),
    [("12*34", "408"), ("-(2+3)*4", "-20"), ("1/3", "0.333333"), ("0.1+0.2", "0.3"), (" 7 ", "7"), ("8/2", "4")]
    + [(text, "error: division by zero") for text in ("1/0", "1/(2-2)")]
    + [
        (text, "error: not an expression of numbers with + - * / and brackets")
        for text in (
            "",
            "2**9",
            "a+1",
            "__import__('os')",
            "1 if 1 else 2",
            "(" * 60,
            "1e50*10",
            "9" * 101,
            "True",
            "1;2",
        )
    ],
)
def test_the_calculator(expression, value):
    turns = ("<calc>5+5</calc>", "= 10", f"then <calc>1</calc> and <calc>{expression}</calc>")
    assert calculator(Episode("?", "", turns)) == f"= {value}"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"function": "calculator"}, "environment.function is 'calculator'; give module:function"),
        ({"max_turns": 1}, "environment.max_turns is 1; it must be at least 2"),
        ({"workers": -1}, "environment.workers is -1"),
        ({"timeout_s": 0.0}, "environment.timeout_s is 0.0"),
    ],
)
def test_what_cannot_be_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        EnvironmentConfig(**given)


def test_the_names_are_explained_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    named = set(re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE))
    names = ("turns_mean", "observation_tokens", "environment_seconds", "environment_failed")
    assert {f"rollout/{name}" for name in names} <= named
