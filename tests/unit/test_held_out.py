"""No problem is both trained on and evaluated on, and the split is the same for everybody."""

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_tokenizer import tiny_tokenizer
from trainers.config import DataConfig, EvaluateConfig, EvaluationConfig, PPOConfig
from trainers.data import Example, arithmetic_problems
from trainers.errors import ConfigError
from trainers.held_out import choose, hold_out, load_data, load_evaluation_prompts, problem


def examples_of(texts: list[str]) -> list[Example]:
    return [Example([number], str(number), text) for number, text in enumerate(texts)]


def operands(text: str) -> frozenset[int]:
    left, right = re.findall(r"[0-9]+", text)
    return frozenset([int(left), int(right)])


@pytest.mark.parametrize("seed", range(5))
def test_no_operands_of_arithmetic_are_on_both_sides(seed):
    rows = arithmetic_problems([1, 2], ["+", "-", "*"], seed)
    training, held_out = hold_out(examples_of([question for question, _ in rows]), 0.2, seed)
    trained, evaluated = ({operands(example.text) for example in side} for side in (training, held_out))
    assert trained and evaluated and not trained & evaluated
    assert len(evaluated) == round(0.2 * len(trained | evaluated))
    assert len({example.text for example in held_out}) == len(held_out)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("abC ", min_size=1, max_size=4), min_size=1), st.floats(0.01, 0.99), st.integers(0, 9))
def test_any_texts_are_split_by_problem_whatever_their_order(texts, share, seed):
    examples = examples_of(texts)
    problems = {problem(text) for text in texts}
    count = max(1, round(share * len(problems)))
    if count >= len(problems):
        with pytest.raises(ConfigError, match="leaves nothing to train on"):
            hold_out(examples, share, seed)
        return
    training, held_out = hold_out(examples, share, seed)
    assert not {problem(e.text) for e in training} & {problem(e.text) for e in held_out}
    assert {e.text for e in training} | {e.text for e in held_out} == set(texts)
    shuffled = random.Random(0).sample(examples, len(examples))
    assert {e.text for e in hold_out(shuffled, share, seed)[1]} == {e.text for e in held_out}


def test_another_seed_holds_out_others():
    examples = examples_of([f"question {number}" for number in range(50)])
    assert hold_out(examples, 0.2, 0) == hold_out(examples, 0.2, 0)
    assert hold_out(examples, 0.2, 0)[1] != hold_out(examples, 0.2, 1)[1]


def test_the_prompts_of_an_evaluation_are_always_the_same_few():
    examples = examples_of([f"question {number % 20}" for number in range(40)])
    chosen = choose(examples, 5, seed=3)
    assert len({example.text for example in chosen}) == 5 == len(chosen)
    assert chosen == choose(examples, 5, seed=3) != choose(examples, 5, seed=4)
    assert len(choose(examples, None, seed=3)) == len(choose(examples, 100, seed=3)) == 20


def test_what_a_run_loads(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    nothing = PPOConfig()
    assert len(load_data(nothing, tokenizer)[0]) == 100 and load_data(nothing, tokenizer)[1] == []

    held_out = PPOConfig(evaluation=EvaluationConfig(held_out=0.2, prompts=8))
    training, evaluated = load_data(held_out, tokenizer)
    assert 70 < len(training) < 90 and len(evaluated) == 8
    alone = EvaluateConfig(evaluation=held_out.evaluation)
    assert load_evaluation_prompts(alone, tokenizer) == evaluated

    file = tmp_path / "others.jsonl"
    file.write_text('{"question": "What is 3+4?", "answer": "7"}\n{"question": "What is 30+40?", "answer": "70"}\n')
    own = EvaluationConfig(source=str(file), every=2)
    training, evaluated = load_data(PPOConfig(evaluation=own), tokenizer)
    assert len(training) == 100 and [example.answer for example in evaluated] == ["7", "70"]
    assert "1 of its problems are trained on, too" in capsys.readouterr().err
    assert load_evaluation_prompts(EvaluateConfig(evaluation=own), tokenizer) == evaluated
    of_data = EvaluateConfig(data=DataConfig(source=str(file)))
    assert load_evaluation_prompts(of_data, tokenizer) == evaluated


def test_other_data_to_evaluate_on_has_its_own_columns(tmp_path):
    tokenizer = tiny_tokenizer()
    file = tmp_path / "competition.jsonl"
    file.write_text('{"problem": "1+1", "solution": "#### 2"}\n')
    own = EvaluationConfig(source=str(file), prompt_column="problem", answer_column="solution", instruction=" Go.")
    _, (example,) = load_data(PPOConfig(evaluation=own), tokenizer)
    assert (example.answer, example.text) == ("2", "1+1 Go.")
    with pytest.raises(ConfigError, match=r"^in the data to evaluate on .*: data.prompt_column is 'question'"):
        load_data(PPOConfig(evaluation=replace(own, prompt_column=None)), tokenizer)
