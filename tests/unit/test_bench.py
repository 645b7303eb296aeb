"""The benchmark without its engines: order of turns, pairing, medians, decode split, tables, picture, arguments."""

import doctest
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from scripts import bench_rollout
from scripts.bench import inputs, picture, plan, report
from scripts.bench.inputs import check_model, find_prompts
from scripts.bench.plan import SYSTEMS, allocations, kv_cache_gib, share_of_rank, step_budget, turns
from scripts.bench.report import decode_split, make_ratios, make_rows, rates_table, ratios_table

ABOUT = {system: {"versions": {"vllm": "0"}, "device": "a device", "runs": {}} for system in SYSTEMS}
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def record(system: str, repeat: int, seconds: float, **changed) -> dict:
    """8 sequences of 5 tokens; the prefill step takes a fifth of the time and gives one token each."""
    figures = {
        "batch": 8,
        "step_ms": None,
        "generated_tokens": 40,
        "decode_seconds": seconds * 0.8,
        "decode_tokens": 32,
    }
    return {"system": system, "repeat": repeat, "seconds": seconds} | figures | changed


@pytest.mark.parametrize("module", [plan, report])
def test_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0


def test_every_repeat_of_one_stands_between_repeats_of_the_others() -> None:
    taken = list(turns(["a", "b", "c"], [32, 64], repeats=3))
    warm_up, counted = taken[:3], taken[3:]
    assert [(turn.system, turn.batch, turn.repeat) for turn in warm_up] == [(s, 64, -1) for s in "abc"]
    assert "".join(turn.system for turn in counted) == "abcbcacab" * 2
    assert [(turn.batch, turn.repeat) for turn in counted[::3]] == [(b, r) for b in (32, 64) for r in range(3)]
    assert [(turn.system, turn.batch, turn.repeat) for turn in taken if turn.last] == [(s, 64, 2) for s in "cab"]


def test_step_times_pair_with_batches_only_where_there_are_as_many() -> None:
    as_pairs = lambda planned: [(each.step_ms, each.batches) for each in planned]  # noqa: E731
    assert as_pairs(allocations([32, 64], [31.6, 34.5])) == [(31.6, (32,)), (34.5, (64,))]
    assert as_pairs(allocations([32, 64, 128], [5.0, 7.0, 5.0])) == [(5.0, (32, 128)), (7.0, (64,))]
    assert as_pairs(allocations([32, 64], [5.0, 7.0, 9.0])) == [(5.0, (32, 64)), (7.0, (32, 64)), (9.0, (32, 64))]
    assert as_pairs(allocations([32, 64], [])) == [(None, (32, 64))]


@pytest.mark.parametrize(("batch", "ranks"), [(4, 2), (5, 2), (5, 3), (1, 2)])
def test_the_ranks_shares_are_the_batch(batch: int, ranks: int) -> None:
    rows = [row for rank in range(ranks) for row in range(batch)[share_of_rank(batch, rank, ranks)]]
    assert rows == list(range(batch))


def test_the_kv_cache_holds_the_whole_batch() -> None:
    # 30 layers, 2 of 4 heads of 64 in bfloat16: 2 * 30 * 2 * 64 * 2 bytes = 15360 a token, 1.875 MiB a block of 128.
    size = dict(num_layers=30, num_kv_heads=2, head_dim=64)
    # 128 tokens and the step ahead need 2 blocks, 127 need one; 64 spare ones.
    assert kv_cache_gib([100, 99], 27 + 1, 128, **size) * 1024 == pytest.approx((2 + 1 + 64) * 1.875)
    assert kv_cache_gib([1], 1, 4096, **size) * 1024 == pytest.approx((32 + 64) * 1.875)  # one of the greatest length


def test_the_simulated_prefill_is_one_step() -> None:
    assert step_budget([256] * 512, 512, simulated=True) == 256 * 512
    assert step_budget([10, 20], 512, simulated=True) == plan.MAX_NUM_BATCHED_TOKENS
    assert step_budget([256] * 512, 512, simulated=False) == plan.MAX_NUM_BATCHED_TOKENS
    assert step_budget([1], 20_000, simulated=False) == 20_000  # vLLM asks for at least a token a sequence


def arrays(*steps: tuple[float, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ends, tokens, sequences = np.array(steps).T
    return ends, tokens, sequences


def test_decode_begins_after_the_last_step_with_prompt_tokens() -> None:
    # Two chunks of prefill, three steps of decoding; a sequence ends before the last.
    steps = arrays((1.0, 64, 3), (2.0, 20, 4), (2.5, 4, 4), (3.0, 4, 4), (3.25, 3, 3))
    assert decode_split(*steps) == (1.25, 11)  # 3.25 - 2.0; 4 + 4 + 3
    # A late arrival: its prefill stands in the middle, and what came before it is no longer counted.
    steps = arrays((1.0, 64, 4), (2.0, 4, 4), (3.0, 34, 5), (4.0, 5, 5))
    assert decode_split(*steps) == (1.0, 5)


def test_a_prompt_of_one_token_is_a_prefill_too() -> None:
    assert decode_split(*arrays((1.0, 4, 4), (1.5, 4, 4), (2.0, 4, 4))) == (1.0, 8)


def test_empty_steps_and_unrecorded_ones_are_no_steps() -> None:
    ended = arrays((0.5, 0, 0), (1.0, 40, 4), (2.0, 4, 4), (2.5, 0, 0))
    assert decode_split(*ended) == (1.0, 4)
    assert decode_split(*arrays((1.0, 40, 4), (2.0, 4, 4), (np.nan, -1, -1))) == (1.0, 4)
    assert decode_split(*arrays((1.0, 40, 4), (2.0, 4, 4), (np.nan, 4, 4))) == (1.0, 4)


def test_without_decode_steps_there_is_no_rate() -> None:
    assert decode_split(*arrays((1.0, 40, 4))) is None
    assert decode_split(np.zeros(0), np.zeros(0, int), np.zeros(0, int)) is None
    (row,) = make_rows([record("stock_sync", 0, 2.0, decode_seconds=None, decode_tokens=0)], 2, ABOUT)
    assert row["decode_tokens_per_s"] is None and row["generated_tokens_per_s"] == 20.0


def test_a_row_has_median_and_range_of_its_repeats() -> None:
    turns_taken = [record("ours_async", r, s, schedule_ms=m) for r, (s, m) in enumerate([(2, 0.3), (1, 0.1), (4, 0.2)])]
    (row,) = make_rows([*turns_taken], 2, ABOUT)
    assert (row["system"], row["batch"], row["tensor_parallel_size"], row["repeats"]) == ("ours_async", 8, 2, 3)
    assert (row["seconds"], row["seconds_min"], row["seconds_max"]) == (2, 1, 4)
    rates = [row[f"generated_tokens_per_s{end}"] for end in ("", "_min", "_max")]
    assert rates == [20.0, 10.0, 40.0]  # 40 tokens / 2, 4 and 1 s
    decode = [row[f"decode_tokens_per_s{end}"] for end in ("", "_min", "_max")]
    assert decode == pytest.approx([20.0, 10.0, 40.0])  # 32 tokens / 1.6, 3.2 and 0.8 s
    assert row["schedule_ms"] == 0.2 and "launch_ms" not in row
    assert row["step_ms"] is None and row["fraction_of_limit"] is None
    assert row["turns"] == turns_taken
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_the_limit_is_a_token_a_sequence_and_step() -> None:
    # 8 sequences, 100 ms: 80 tokens/s. 40 tokens in 1 s are half of it; the 4 decode steps took 0.8 s: half as well.
    (row,) = make_rows([record("ours_sync", 0, 1.0, step_ms=100.0)], 1, ABOUT)
    assert row["fraction_of_limit"] == pytest.approx(0.5) and row["decode_fraction_of_limit"] == pytest.approx(0.5)


def test_ratios_pair_the_repeats() -> None:
    # The machine slows down by 10 in the second repeat: medians of each would say 1.1 / 1.1, the pairs say 2 and 4.
    taken = [record("stock_sync", 0, 2.0), record("ours_async", 0, 1.0)]
    taken += [record("ours_async", 1, 10.0), record("stock_sync", 1, 40.0)]
    (ratio,) = make_ratios(taken)
    assert (ratio["numerator"], ratio["denominator"], ratio["repeats"]) == ("ours_async", "stock_sync", 2)
    assert (ratio["phase_ratio"], ratio["phase_ratio_min"], ratio["phase_ratio_max"]) == (3.0, 2.0, 4.0)
    assert ratio["decode_ratio"] == pytest.approx(3.0)


def test_ratios_of_all_pairs_and_of_what_is_there() -> None:
    everyone = [record(system, 0, 1.0 + number) for number, system in enumerate(SYSTEMS)]
    found = [(row["numerator"], row["denominator"]) for row in make_ratios(everyone)]
    assert found == [("ours_async", other) for other in ("stock_sync", "stock_async", "ours_sync")]
    assert make_ratios([record("stock_sync", 0, 1.0), record("ours_async", 1, 1.0)]) == []  # no repeat has both
    other_batch = [record("stock_sync", 0, 1.0, batch=4), record("ours_async", 0, 1.0)]
    assert make_ratios(other_batch) == []
    (ratio,) = make_ratios([record("stock_sync", 0, 1.0, decode_seconds=None), record("ours_async", 0, 1.0)])
    assert ratio["phase_ratio"] == 1.0 and ratio["decode_ratio"] is None


def test_tables_have_a_line_a_row_and_no_empty_columns() -> None:
    taken = [record(system, repeat, 1.0 + repeat) for system in ("stock_sync", "ours_async") for repeat in range(2)]
    lines = rates_table(make_rows(taken, 2, ABOUT)).split("\n")
    assert len(lines) == 2 + 2 and len(set(map(len, lines))) == 1
    assert "30 [20 .. 40]" in lines[2] and "stock vLLM, synchronous" in lines[2]  # 40 tokens in 1 s and in 2 s
    assert "step ms" not in lines[0] and "of limit" not in lines[0] and "gap" not in lines[0]
    simulated = [each | {"step_ms": 12.0, "host_gap_fraction": 0.25} for each in taken]
    assert {"step ms", "of limit", "gap"} <= {
        cell.strip() for cell in rates_table(make_rows(simulated, 2, ABOUT)).split("|")
    }
    assert "ours_async / stock_sync" in ratios_table(make_ratios(taken)).split("\n")[2]


@pytest.mark.parametrize("step_times", [[], [12.0], [31.6, 34.5], [6.0, 12.0, 30.0]])
def test_the_picture_shows_every_row(step_times: list[float], tmp_path: Path) -> None:
    taken = [
        record(system, repeat, 1.0 + repeat, batch=batch, step_ms=allocation.step_ms)
        for allocation in allocations([32, 64], step_times)
        for batch in allocation.batches
        for system in ("stock_sync", "ours_async")
        for repeat in range(3)
    ]
    rows = make_rows(taken, 2, ABOUT)
    assert picture.plot_rates(rows, "title", tmp_path / "rates.png").read_bytes().startswith(PNG_MAGIC)
    columns = picture._columns(rows)
    assert len(columns) == (3 if len(step_times) == 3 else 1)
    assert sorted(map(id, (row for column in columns for row in column))) == sorted(map(id, rows))


def test_a_bar_is_the_median_and_its_whisker_the_range() -> None:
    from matplotlib.figure import Figure

    rows = make_rows([record("ours_async", repeat, seconds) for repeat, seconds in enumerate([2, 1, 4])], 2, ABOUT)
    axes = Figure().add_subplot()
    picture._draw(axes, rows, "generated_tokens_per_s")
    (bars,) = [container for container in axes.containers if container.get_label() == "RolloutEngine, asynchronous"]
    assert [bar.get_height() for bar in bars] == [20.0]
    (whisker,) = axes.collections[0].get_segments()
    assert whisker[:, 1].tolist() == [10.0, 40.0]


def test_prompts_are_checked_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"problem": "What is 1+1?"}\n\n')
    assert find_prompts(file, tmp_path) == file
    for text in ("", '{"question": "?"}\n', "no JSON\n", '{"problem": ""}\n', "[1]\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match='give JSON lines, each such as {"problem"'):
            find_prompts(file, tmp_path)
    with pytest.raises(ValueError, match="No such file"):
        find_prompts(tmp_path / "nowhere.jsonl", tmp_path)


def test_without_a_copy_and_a_hub_the_message_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(inputs, "SHARED_COPY", tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(
        ValueError, match="MATH-500 cannot be loaded from the hub .no network.. Give --prompts FILE.jsonl"
    ):
        find_prompts(None, tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"problem": ["a", "b"]})
    lines = find_prompts(None, tmp_path).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"problem": "a"}, {"problem": "b"}]


def test_a_model_that_cannot_be_split_names_the_script(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_attention_heads": 9, "hidden_size": 576})
    )
    check_model(str(tmp_path), 3)
    with pytest.raises(
        ValueError, match="does not divide the 9 attention heads.*prepare_model.py --tensor-parallel-size 2"
    ):
        check_model(str(tmp_path), 2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="give a local folder or a hub name"):
        check_model(str(tmp_path), 2)


def parsed(*words: str):
    return bench_rollout.arguments(["--model", "somewhere", *words])


def test_a_workload_fills_in_what_is_not_given() -> None:
    args = parsed("--workload", "pr23914", "--simulate-step-ms", "31.6,34.5,42.0,63.4")
    assert (args.batch_sizes, args.max_tokens, args.max_prompt_tokens) == ([32, 64, 128, 256], 512, None)
    assert args.simulate_step_ms == [31.6, 34.5, 42.0, 63.4] and args.systems == list(SYSTEMS)
    args = parsed("--workload", "pr23914", "--max-tokens", "64", "--batch-sizes", "8", "--systems", "ours_sync")
    assert (args.batch_sizes, args.max_tokens, args.systems) == ([8], 64, ["ours_sync"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--systems", "vllm"], "'vllm' is no system; there are stock_sync, stock_async, ours_sync, ours_async"),
        (["--batch-sizes", "32,many"], "'32,many' is no list of whole numbers, such as 32,64"),
        (["--batch-sizes", "0"], "--batch-sizes is 0; it must be at least 1"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--max-tokens", "1024"], "give at most 1023"),
        (["--simulate-step-ms", "-1"], "every step takes more than 0 ms"),
        (["--json", "nowhere/a.json"], "in a folder that does not exist"),
        (["--systems", "stock_sync", "--trace", "a.json"], "add ours_async to --systems"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed(*words)
    assert message in capsys.readouterr().err


def test_stock_async_is_for_cuda_or_the_simulated_accelerator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parsed().systems == ["stock_sync", "ours_sync", "ours_async"]
    assert "stock_async is left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("--systems", "stock_async")
    assert parsed("--systems", "stock_async", "--simulate-step-ms", "12").systems == ["stock_async"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parsed().systems == list(SYSTEMS)


def test_the_trace_is_of_our_asynchronous_system() -> None:
    assert bench_rollout._traced(parsed("--trace", "a.json", "--systems", "ours_async,ours_sync")) == "ours_async"
    assert bench_rollout._traced(parsed("--systems", "ours_async")) is None
