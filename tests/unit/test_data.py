"""What a prompt says to the model, what its answer is, and that the steps of any number of ranks draw the same rows."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer
from trainers.config import DataConfig
from trainers.data import Example, PromptStream, arithmetic_problems, load_prompts
from trainers.errors import ConfigError

ROWS = [
    {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4", "level": 1},
    {"question": "A thousand and one?", "answer": "#### 1,001", "level": 2},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(config: DataConfig, tokenizer, limit: int = 1000) -> str:
    with pytest.raises(ConfigError) as error:
        load_prompts(config, tokenizer, limit)
    return str(error.value)


# --- prompts


@pytest.mark.parametrize(
    ("system_prompt", "system"),
    [
        (None, "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("", ""),
        ("Answer briefly.", "Answer briefly."),
    ],
)
def test_a_prompt_is_the_chat_up_to_where_the_assistant_begins(tokenizer, system_prompt, system):
    config = DataConfig(system_prompt=system_prompt, instruction=" Number only.", shuffle=False)
    example = load_prompts(config, tokenizer, 1000)[34]  # 3 * 10 + 4: the problems count up
    assert tokenizer.decode(example.prompt_ids) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWhat is 3+4? Number only.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (example.text, example.answer) == ("What is 3+4? Number only.", "7")
    assert type(example.prompt_ids) is list and all(type(token) is int for token in example.prompt_ids)


def test_a_model_without_a_chat_template_reads_the_plain_text():
    base = tiny_tokenizer(chat_template=None)
    assert base.decode(load_prompts(DataConfig(), base, 1000)[34].prompt_ids) == "What is 3+4?"
    assert "no chat template" in refused(DataConfig(system_prompt="x"), base)


def test_a_chat_template_that_refuses_a_system_message_is_named():
    strict = tiny_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    )
    assert "no system role" in refused(DataConfig(system_prompt=""), strict)
    assert len(load_prompts(DataConfig(), strict, 1000)) == 100


# --- arithmetic


def test_one_digit_sums_are_all_there_once():
    rows = arithmetic_problems([1], ["+"], seed=0)
    assert len(rows) == len(set(rows)) == 100
    assert rows[:2] == [("What is 0+0?", "0"), ("What is 0+1?", "1")] and rows[-1] == ("What is 9+9?", "18")


def test_two_digit_operands_have_no_leading_zero_and_each_answer_is_right():
    rows = arithmetic_problems([2], ["*", "-"], seed=0)
    assert len(rows) == len(set(rows)) == 2 * 90 * 90
    assert rows[0] == ("What is 10*10?", "100") and rows[8099] == ("What is 99*99?", "9801")
    assert rows[8100] == ("What is 10-10?", "0") and ("What is 10-99?", "-89") in rows


def test_kinds_are_mixed_evenly_by_repetition():
    rows = arithmetic_problems([1, 2], ["+"], seed=0)
    assert len(rows) == 2 * 8100
    assert rows.count(("What is 9+9?", "18")) == 81  # 8100 / 100


def test_of_many_problems_a_seeded_part_is_drawn():
    rows = arithmetic_problems([3], ["+"], seed=1)
    assert len(rows) == len(set(rows)) == 10_000
    assert rows == arithmetic_problems([3], ["+"], seed=1) != arithmetic_problems([3], ["+"], seed=2)
    for question, answer in rows[:50]:
        left, right = question.removeprefix("What is ").removesuffix("?").split("+")
        assert len(left) == len(right) == 3 and int(left) + int(right) == int(answer)


# --- files and the hub


def write_rows(tmp_path: Path, kind: str, rows: list[dict]) -> str:
    path = tmp_path / f"rows.{kind.removesuffix('-lines')}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_jsonl(path, rows)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "json-lines", "parquet"])
def test_each_kind_of_file_gives_the_same_rows(tmp_path, tokenizer, kind):
    examples = load_prompts(DataConfig(source=write_rows(tmp_path, kind, ROWS)), tokenizer, 1000)
    assert [(example.text, example.answer) for example in examples] == [
        ("Two and two?", "4"),
        ("A thousand and one?", "1,001"),
    ]


def test_columns_are_chosen_and_numbers_are_answers_too(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "2+2", "level": 4}, {"problem": "1/2", "level": 0.5}])
    examples = load_prompts(DataConfig(source=source, prompt_column="problem", answer_column="level"), tokenizer, 1000)
    assert [(example.text, example.answer) for example in examples] == [("2+2", "4"), ("1/2", "0.5")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("key", ["prompt_column", "answer_column"])
def test_a_missing_column_is_refused_with_those_that_exist(tmp_path, tokenizer, kind, key):
    message = refused(DataConfig(source=write_rows(tmp_path, kind, ROWS), **{key: "problem"}), tokenizer)
    assert f"data.{key} is 'problem'" in message
    assert "question, answer, level" in message


def test_a_folder_is_loaded_by_datasets(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    examples = load_prompts(DataConfig(source=str(folder)), tokenizer, 1000)
    assert [example.answer for example in examples] == ["4", "1,001"]
    assert "question, answer, level" in refused(DataConfig(source=str(folder), answer_column="x"), tokenizer)
    message = refused(DataConfig(source=str(folder), split="test"), tokenizer)
    assert "data.split 'test'" in message and "train" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"question": "a", "answer": "1"}\n{"question": ', "neither JSON lines nor a JSON array"),
        ("", "must hold rows"),
        ("[]", "must hold rows"),
        ("3\n", "must hold rows"),
        ('{"question": null, "answer": "1"}', "row 0 of"),
        ('{"question": "a", "answer": "1"}\n{"question": " ", "answer": "1"}', "row 1 of"),
        ('{"question": "a", "answer": "1"}\n{"question": "a"}', "answer is None"),
        ('{"question": "a", "answer": ["1"]}', "answer is ['1']"),
        ('{"question": "a", "answer": "72 ####"}', "answer is '72 ####'"),
    ],
)
def test_a_broken_file_is_refused_with_its_row(tmp_path, tokenizer, text, part):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    message = refused(DataConfig(source=str(path)), tokenizer)
    assert part in message and "rows.jsonl" in message


def test_a_source_that_is_not_there_is_refused(tmp_path, tokenizer):
    assert "not a file" in refused(DataConfig(source=str(tmp_path / "none.jsonl")), tokenizer)
    (tmp_path / "rows.csv").write_text("question,answer\n")
    assert ".jsonl or .json or .parquet" in refused(DataConfig(source=str(tmp_path / "rows.csv")), tokenizer)
    (tmp_path / "rows.parquet").write_text("no parquet")
    assert "not a Parquet file" in refused(DataConfig(source=str(tmp_path / "rows.parquet")), tokenizer)
    assert "did you mean data.source=arithmetic" in refused(DataConfig(source="arithmetc"), tokenizer)


# --- prompts that are too long. With an empty system prompt the tiny tokenizer makes, of a text of n bytes,
# 1 + 7 + 1 + 1 (system, newline) + 1 + 5 + n + 1 + 1 (user) + 1 + 10 (assistant) = n + 29 tokens.


@pytest.fixture
def three_lengths(tmp_path):
    rows = [{"question": "x" * length, "answer": "1"} for length in (1, 21, 11)]
    return {"source": write_jsonl(tmp_path / "rows.jsonl", rows), "system_prompt": ""}


def test_a_prompt_of_just_the_limit_passes(tokenizer, three_lengths):
    assert [len(e.prompt_ids) for e in load_prompts(DataConfig(**three_lengths), tokenizer, 50)] == [30, 50, 40]


def test_a_prompt_over_the_engines_limit_names_the_row_and_the_way_out(tokenizer, three_lengths):
    message = refused(DataConfig(**three_lengths), tokenizer, limit=49)
    for part in ("1 of 3 prompts", "row 1,", "has 50 tokens", "the limit is 49", "Raise rollout.max_model_len by 1"):
        assert part in message
    assert "data.overlong=drop" in message


def test_a_prompt_over_the_datas_own_limit_names_that_one(tokenizer, three_lengths):
    message = refused(DataConfig(**three_lengths, max_prompt_tokens=30), tokenizer, limit=1000)
    for part in ("2 of 3 prompts", "row 1,", "the limit is 30", "Raise data.max_prompt_tokens (30) to 50"):
        assert part in message


def test_dropping_says_how_many_on_one_rank_only(tokenizer, three_lengths, capsys, monkeypatch):
    config = DataConfig(**three_lengths, overlong="drop")
    assert [len(e.text) for e in load_prompts(config, tokenizer, 49)] == [1, 11]
    assert "dropped 1 of 3 prompts" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    load_prompts(config, tokenizer, 49)
    assert capsys.readouterr().err == ""
    assert "3 of 3 prompts" in refused(config, tokenizer, limit=29)  # nothing would be left


# --- the stream


def numbered(count: int) -> list[Example]:
    return [Example([number], str(number), str(number)) for number in range(count)]


def draw(streams: list[PromptStream], steps: int) -> list[list[int]]:
    """The rows of each step, rank after rank."""
    return [[int(example.text) for stream in streams for example in next(stream)] for _ in range(steps)]


def world(rows: int, per_step: int, world_size: int, seed: int = 0, position: int = 0, shuffle: bool = True):
    return [
        PromptStream(numbered(rows), per_step // world_size, rank, world_size, seed, shuffle, position)
        for rank in range(world_size)
    ]


@settings(deadline=None)
@given(
    rows=st.integers(1, 30),
    share=st.integers(1, 5),
    world_size=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 5),
    passes=st.integers(1, 3),
)
def test_each_row_comes_once_a_pass_on_any_number_of_ranks(rows, share, world_size, seed, passes):
    per_step = 12 * share  # divides over 1, 2, 3 and 4 ranks
    steps = -(-passes * rows // per_step)
    drawn = [row for step in draw(world(rows, per_step, world_size, seed), steps) for row in step]
    for number in range(passes):
        assert sorted(drawn[number * rows : (number + 1) * rows]) == list(range(rows))
    alone = [row for step in draw(world(rows, per_step, 1, seed), steps) for row in step]
    assert drawn == alone


@settings(deadline=None)
@given(
    rows=st.integers(1, 30), before=st.integers(0, 7), after=st.integers(1, 7), world_size=st.sampled_from([1, 2, 4])
)
def test_a_stream_resumes_at_its_position_on_another_number_of_ranks(rows, before, after, world_size):
    whole = draw(world(rows, 4, 1), before + after)
    stopped = world(rows, 4, 2)
    draw(stopped, before)
    assert {stream.position for stream in stopped} == {4 * before}
    assert draw(world(rows, 4, world_size, position=4 * before), after) == whole[before:]
    stopped[0].position = 0  # may also be set, back as well
    assert [int(example.text) for example in next(stopped[0])] == whole[0][:2]


def test_orders_differ_by_pass_and_by_seed_and_can_be_switched_off():
    first, second = draw(world(50, 50, 1), 2)
    assert first != second and first != list(range(50))
    assert draw(world(50, 50, 1, seed=1), 1)[0] != first
    assert draw(world(5, 4, 2, shuffle=False), 2) == [[0, 1, 2, 3], [4, 0, 1, 2]]


def test_the_template_of_these_tests_is_a_real_one():
    assert "named SmolLM" in CHAT_TEMPLATE
