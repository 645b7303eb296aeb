"""Prompts with their answers, and the order in which the steps of a run draw them.

Rows of a source (arithmetic, local file, hub) -> chat template -> list[Example] -> PromptStream, a share a step.
"""

import difflib
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.config import DataConfig
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_PROBLEMS_PER_KIND = 10_000  # all 8,100 two-digit sums fit; of longer ones this many are drawn
TOKENIZER_BATCH = 1000

ARITHMETIC_PROBLEM = re.compile(r"What is ([0-9]+)[-+*]([0-9]+)\?")
"""Its groups are the operands."""

Row = tuple[str, str]
"""Question and answer."""


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        prompt_ids: token ids, chat template included, ready for RolloutEngine.generate.
        answer: what the reward compares a response with.
        text: the user's message, without the chat template.
    """

    prompt_ids: list[int]
    answer: str
    text: str


def load_prompts(config: DataConfig, tokenizer: "PreTrainedTokenizerBase", max_prompt_tokens: int) -> list[Example]:
    """Read every prompt of the source: the same list on all ranks.

    Args:
        max_prompt_tokens: what the engine can take (PPOConfig.max_prompt_tokens); config.max_prompt_tokens lowers it.

    Raises:
        ConfigError: if the source or a column is missing, a row has no text, or a prompt exceeds the limit and
            config.overlong is "error".
    """
    limit = min(max_prompt_tokens, config.max_prompt_tokens or max_prompt_tokens)
    rows = _read_rows(config)
    texts = [question + config.instruction for question, _ in rows]
    # Arithmetic repeats problems to mix its kinds evenly: tokenize each text once.
    distinct = list(dict.fromkeys(texts))
    ids = dict(zip(distinct, _tokenize(distinct, config.system_prompt, tokenizer), strict=True))
    examples = [Example(ids[text], answer, text) for text, (_, answer) in zip(texts, rows, strict=True)]
    fitting = [example for example in examples if len(example.prompt_ids) <= limit]
    if len(fitting) == len(examples):
        return examples
    if config.overlong == "error" or not fitting:
        row, longest = max(enumerate(examples), key=lambda item: len(item[1].prompt_ids))
        raise ConfigError(
            f"{len(examples) - len(fitting)} of {len(examples)} prompts of {config.source} are too long; the longest, "
            f"row {row}, has {len(longest.prompt_ids)} tokens ({longest.text[:40]!r}...) where the limit is {limit}. "
            f"{_how_to_raise_the_limit(config, len(longest.prompt_ids), max_prompt_tokens)}"
            + (", or set data.overlong=drop to leave them out" if fitting else "")
        )
    if os.environ.get("RANK", "0") == "0":  # all ranks read the same; stderr, since --dry-run prints YAML
        dropped = len(examples) - len(fitting)
        print(f"data: dropped {dropped} of {len(examples)} prompts: over {limit} tokens", file=sys.stderr, flush=True)
    return fitting


def _how_to_raise_the_limit(config: DataConfig, needed: int, max_prompt_tokens: int) -> str:
    if needed <= max_prompt_tokens:
        return f"Raise data.max_prompt_tokens ({config.max_prompt_tokens}) to {needed}"
    also = " and data.max_prompt_tokens" if config.max_prompt_tokens else ""
    return f"Raise rollout.max_model_len by {needed - max_prompt_tokens}{also}"


def _tokenize(texts: list[str], system_prompt: str | None, tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each text as a user's message, up to where the assistant begins."""
    if tokenizer.chat_template is None:
        if system_prompt is not None:
            raise ConfigError("data.system_prompt is set, but the model has no chat template to put it in; set null")
        for batch in _batches(texts):
            yield from tokenizer(batch)["input_ids"]
        return
    from jinja2 import TemplateError

    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    for batch in _batches(texts):
        chats = [[*system, {"role": "user", "content": text}] for text in batch]
        try:
            yield from tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ConfigError(
                f"the model's chat template refuses the messages: {error} (data.system_prompt is {system_prompt!r}; "
                "some models take none: set null)"
            ) from error


def _batches(texts: list[str]) -> Iterator[list[str]]:
    return (texts[start : start + TOKENIZER_BATCH] for start in range(0, len(texts), TOKENIZER_BATCH))


def _read_rows(config: DataConfig) -> list[Row]:
    if config.source == "arithmetic":
        return arithmetic_problems(config.arithmetic_digits, config.arithmetic_operators, config.seed)
    path = Path(config.source)
    if path.suffix in FILE_SUFFIXES:
        if not path.is_file():
            raise ConfigError(f"data.source is {config.source!r}, which is not a file (seen from {Path.cwd()})")
        columns, records = _read_parquet(path, config) if path.suffix == ".parquet" else _read_json(path)
    elif path.is_file():
        raise ConfigError(f"data.source is {config.source!r}; a local file must end in {' or '.join(FILE_SUFFIXES)}")
    elif difflib.get_close_matches(config.source, ["arithmetic"], cutoff=0.8):  # before a minute of network retries
        raise ConfigError(f"data.source is {config.source!r}; did you mean data.source=arithmetic?")
    else:
        columns, records = _read_hub(config)
    for key in ("prompt_column", "answer_column"):
        if getattr(config, key) not in columns:
            raise ConfigError(
                f"data.{key} is {getattr(config, key)!r}, but {config.source} has the columns {', '.join(columns)}; "
                f"set data.{key} to the one that holds the {key.removesuffix('_column')}s"
            )
    rows = [_row(number, record, config) for number, record in enumerate(records)]
    if not rows:
        raise ConfigError(f"data.source is {config.source!r}, which has no rows")
    return rows


def _row(number: int, record: dict[str, Any], config: DataConfig) -> Row:
    question, answer = record.get(config.prompt_column), record.get(config.answer_column)
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"row {number} of {config.source}: {config.prompt_column} is {question!r}; it must be text")
    if not isinstance(answer, str | int | float) or not (answer := final_answer(str(answer))):
        value = record.get(config.answer_column)
        raise ConfigError(
            f"row {number} of {config.source}: {config.answer_column} is {value!r}; it must be text or a number"
        )
    return question, answer


def final_answer(answer: str) -> str:
    """The part of an answer to compare with: what follows the last "####" (GSM8K's mark), else all of it.

    >>> final_answer("48 / 2 = <<48/2=24>>24 clips.\\n#### 1,024"), final_answer(" 7 ")
    ('1,024', '7')
    """
    return answer.rpartition("####")[2].strip()


def arithmetic_problems(digits: Sequence[int], operators: Sequence[str], seed: int) -> list[Row]:
    """Problems such as ("What is 3+4?", "7"), each pair of digit count and operator making up an equal part.

    Both operands have the same number of digits, without leading zeros. A kind with fewer problems than the largest
    one is repeated; of a kind with more than 10,000 that many are drawn with `seed`.

    >>> rows = arithmetic_problems(digits=[1], operators=["+", "-"], seed=0)
    >>> len(rows), ("What is 3+4?", "7") in rows, ("What is 3-4?", "-1") in rows
    (200, True, True)
    """
    kinds = [_problems(count, operator, seed) for count in digits for operator in operators]
    size = max(map(len, kinds))
    return [row for kind in kinds for row in itertools.islice(itertools.cycle(kind), size)]


def _problems(digits: int, operator: str, seed: int) -> list[Row]:
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits
    values = high - low
    numbers: Iterable[int] = range(values**2)
    if values**2 > MAX_PROBLEMS_PER_KIND:
        numbers = random.Random(f"{seed} {digits} {operator}").sample(range(values**2), MAX_PROBLEMS_PER_KIND)
    rows = []
    for number in numbers:
        left, right = low + number // values, low + number % values
        answer = {"+": left + right, "-": left - right, "*": left * right}[operator]
        rows.append((f"What is {left}{operator}{right}?", str(answer)))
    return rows


def _read_json(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns of the first row, and the rows: one object a line, or one array of objects."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:  # of JSON or of UTF-8
        raise ConfigError(f"{path} is neither JSON lines nor a JSON array: {error}") from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise ConfigError(f'{path} must hold rows that are JSON objects, such as {{"question": ..., "answer": ...}}')
    return list(records[0]), records


def _read_parquet(path: Path, config: DataConfig) -> tuple[list[str], list[dict[str, Any]]]:
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
        return columns, pyarrow.parquet.read_table(path, columns=_wanted(columns, config)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} is not a Parquet file: {error}") from error


def _read_hub(config: DataConfig) -> tuple[list[str], list[dict[str, Any]]]:
    import datasets

    try:
        dataset = datasets.load_dataset(config.source, config.subset, split=config.split)
    except Exception as error:  # of many kinds: no such name, no network, a wrong subset or split, a broken file
        raise ConfigError(
            f"data.source is {config.source!r} (data.subset {config.subset!r}, data.split {config.split!r}), which "
            f"datasets.load_dataset cannot load: {error}. Accepted: arithmetic, a local file that ends in "
            f"{' or '.join(FILE_SUFFIXES)}, a local data set folder, or a hub name"
        ) from error
    return dataset.column_names, dataset.select_columns(_wanted(dataset.column_names, config)).to_list()


def _wanted(columns: Sequence[str], config: DataConfig) -> list[str]:
    """The two columns to read, where they exist: others may hold images."""
    return [column for column in columns if column in (config.prompt_column, config.answer_column)]


class PromptStream:
    """An endless stream of a rank's share of each step's prompts.

    The rows come in passes over the data, each in an order of its own drawn from (seed, pass); a step takes the next
    `per_rank * world_size` of them and rank r the r-th part. So step k has the same prompts on any number of ranks,
    every row comes once a pass, and `position` is all there is to save.

    Args:
        examples: the same list on all ranks.
        per_rank: prompts a step of this rank.
        rank: of this process, in 0 .. world_size - 1.
        world_size: all ranks.
        seed: of the orders; unused without shuffle.
        shuffle: False keeps the order of `examples`.
        position: rows drawn so far by all ranks together; set it to resume.

    >>> examples = [Example([n], str(n), str(n)) for n in range(5)]
    >>> stream = PromptStream(examples, per_rank=2, rank=1, world_size=2, seed=0, shuffle=False)
    >>> [example.text for example in next(stream)], [example.text for example in next(stream)], stream.position
    (['2', '3'], ['1', '2'], 8)
    """

    def __init__(
        self,
        examples: Sequence[Example],
        per_rank: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        position: int = 0,
    ) -> None:
        assert len(examples) > 0 and per_rank > 0 and 0 <= rank < world_size and position >= 0
        self.examples = examples
        self.per_rank = per_rank
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.position = position
        self._order: tuple[int, np.ndarray] | None = None  # of the pass last drawn from

    def __iter__(self) -> "PromptStream":
        return self

    def __next__(self) -> list[Example]:
        """This rank's prompts of the next step, (per_rank,); moves `position` on by those of all ranks."""
        first = self.position + self.rank * self.per_rank
        self.position += self.per_rank * self.world_size
        return [self.examples[self._row(number)] for number in range(first, first + self.per_rank)]

    def _row(self, number: int) -> int:
        epoch, offset = divmod(number, len(self.examples))
        if not self.shuffle:
            return offset
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        return int(self._order[1][offset])
