"""Which prompts are trained on and which are evaluated on, never both."""

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trainers.config import Experiment
from trainers.data import ARITHMETIC_PROBLEM, Example, load_prompts
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OF_THE_DATA = ("source", "split", "subset", "prompt_column", "answer_column", "instruction")
"""Keys of `evaluation` that mean for its data what those of `data` do."""


def load_data(config: Experiment, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[Example], list[Example]]:
    """The prompts to train on and those to evaluate on: the same two lists on all ranks.

    Evaluated on are those of evaluation.source and evaluation.split, else the share evaluation.held_out of `data`; at
    most evaluation.prompts of them. Without either, none.

    Raises:
        ConfigError: if the data is at fault (`load_prompts`), or too small to hold anything out.
    """
    evaluation = config.evaluation
    training = load_prompts(config.data, tokenizer, config.max_prompt_tokens)
    held_out: list[Example] = []
    if evaluation.held_out:
        training, held_out = hold_out(training, evaluation.held_out, config.data.seed)
    elif evaluation.has_own_data:
        held_out = _read_named(config, tokenizer)
        both = {problem(example.text) for example in training} & {problem(example.text) for example in held_out}
        if both and os.environ.get("RANK", "0") == "0":
            print(f"evaluation: {len(both)} of its problems are trained on, too", file=sys.stderr, flush=True)
    return training, choose(held_out, evaluation.prompts, config.data.seed)


def load_evaluation_prompts(config: Experiment, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Those of `load_data` without the training's, for an evaluation alone; where none are named, of `data` itself."""
    if config.evaluation.held_out:
        return load_data(config, tokenizer)[1]
    return choose(_read_named(config, tokenizer), config.evaluation.prompts, config.data.seed)


def hold_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split by problems: what is equal, or the same operands in arithmetic, goes to one side whole.

    The problems are ranked by a hash of (seed, problem) and the first `share` of them held out, at least one. So the
    split depends neither on the order of the data nor on any generator.

    Returns:
        The examples to train on, in their order, repeated ones included; and those held out, each once.

    Raises:
        ConfigError: if there are fewer than two problems, or so few that none would be left to train on.

    >>> examples = [Example([0], "", f"What is {a}+{b}?") for a in (1, 2) for b in (1, 2)]
    >>> training, held_out = hold_out(examples, share=0.3, seed=4)  # one of {1, 1}, {1, 2}, {2, 2}
    >>> [example.text for example in training], [example.text for example in held_out]
    (['What is 1+1?', 'What is 2+2?'], ['What is 1+2?', 'What is 2+1?'])
    """
    problems = {problem(example.text) for example in examples}
    count = max(1, round(share * len(problems)))
    if count >= len(problems):
        raise ConfigError(
            f"evaluation.held_out is {share} of {len(problems)} problems, which leaves nothing to train on; lower it, "
            "or give more data"
        )
    kept_out = set(sorted(problems, key=lambda each: _rank(seed, each))[:count])
    training = [example for example in examples if problem(example.text) not in kept_out]
    return training, distinct([example for example in examples if problem(example.text) in kept_out])


def choose(examples: Sequence[Example], count: int | None, seed: int) -> list[Example]:
    """At most `count` distinct prompts, the same ones for a seed, in the order of the data; None takes all."""
    found = distinct(examples)
    chosen = {example.text for example in sorted(found, key=lambda each: _rank(seed, each.text))[:count]}
    return [example for example in found if example.text in chosen]


def distinct(examples: Sequence[Example]) -> list[Example]:
    """The first example of each text."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.text, example)
    return list(first.values())


def problem(text: str) -> str:
    """What two prompts have in common that must not stand on both sides: the text, or the two operands of arithmetic.

    >>> problem("What is 4+3? Be brief.") == problem("What is 3-4?"), problem("How  many?"), problem("How many? ")
    (True, 'how many?', 'how many?')
    """
    match = ARITHMETIC_PROBLEM.match(text)
    if match is not None:
        return " ".join(sorted(match.groups(), key=int))
    return " ".join(text.split()).casefold()


def _read_named(config: Experiment, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    evaluation = config.evaluation
    named = {key: getattr(evaluation, key) for key in OF_THE_DATA}
    own = replace(config.data, **{key: value for key, value in named.items() if value is not None})
    if evaluation.source is not None:
        own = replace(own, subset=evaluation.subset)  # another data set's subset means nothing here
    try:
        return load_prompts(own, tokenizer, config.max_prompt_tokens)
    except ConfigError as error:
        if not evaluation.has_own_data:
            raise
        raise ConfigError(f"in the data to evaluate on (evaluation.* stands in for data.*): {error}") from error


def _rank(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode()).digest()
