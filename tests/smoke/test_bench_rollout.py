"""scripts/bench_rollout.py as a user runs it, tiny: the model itself, and the simulated accelerator."""

import json
import time
from pathlib import Path

import pytest

from rollout.backend.shared_memory import SHARED_MEMORY
from scripts.bench.plan import Settings
from scripts.bench.turns import System
from tests.launch import launch


def bench(model: Path, folder: Path, *more: str) -> tuple[dict, list[dict]]:
    """Run two systems for two repeats of 4 sequences x 4 tokens; the JSON, and the events of the trace."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"problem": f"What is {number}+1?"}) + "\n" for number in range(3)))
    words = [f"--model={model}", f"--prompts={prompts}", "--batch-sizes=4", "--max-tokens=4", "--repeats=2"]
    words += ["--tensor-parallel-size=2", "--enforce-eager", f"--json={folder / 'bench.json'}"]
    words += [f"--plot={folder / 'bench.png'}", f"--trace={folder / 'trace.json'}", *more]
    done = launch(["scripts/bench_rollout.py", *words], nproc=None, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    assert (folder / "bench.png").stat().st_size > 0
    assert "| batch |" in done.stdout and "/ stock_" in done.stdout
    found = json.loads((folder / "bench.json").read_text())
    for row in found["rows"]:
        assert (row["batch"], row["repeats"], row["tensor_parallel_size"], len(row["turns"])) == (4, 2, 2, 2)
        assert {turn["generated_tokens"] for turn in row["turns"]} == {4 * 4}
        assert {turn["decode_tokens"] for turn in row["turns"]} == {4 * 3}  # the prefill gives the first
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["decode_tokens_per_s"] > 0
        assert row["versions"].keys() == {"vllm", "torch", "python"}
    return found, json.loads((folder / "trace.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_stock_and_ours_on_the_model_itself(tiny_model_path: Path, tmp_path: Path) -> None:
    found, events = bench(tiny_model_path, tmp_path, "--systems=stock_sync,ours_async")
    stock, ours = found["rows"]
    assert (stock["system"], ours["system"]) == ("stock_sync", "ours_async")
    assert not stock["runs"]["asynchronous"] and ours["runs"]["asynchronous"]
    assert stock["fraction_of_limit"] is None and "schedule_ms" not in stock
    assert 0.0 <= ours["host_gap_fraction"] < 1.0 and ours["schedule_ms"] > 0 and ours["preemptions"] == 0
    (ratio,) = found["ratios"]
    assert (ratio["numerator"], ratio["denominator"], ratio["repeats"]) == ("ours_async", "stock_sync", 2)
    assert {event["pid"] for event in events} == {0, 1}
    # An asynchronous scheduler launches a few empty steps at the end.
    launches = [event for event in events if event["name"] == "launch" and event["args"]["scheduled_tokens"] > 0]
    assert len(launches) == 2 * ours["decode_steps"] == 2 * 4


@pytest.mark.slow
def test_asynchronous_stock_and_ours_on_the_simulated_accelerator(tiny_model_path: Path, tmp_path: Path) -> None:
    more = ["--systems=stock_async,ours_async", "--simulate-step-ms=20"]
    found, events = bench(tiny_model_path, tmp_path, *more)
    for row in found["rows"]:
        assert row["runs"]["asynchronous"] and row["runs"]["model_runner"] == "SimulatedRunner"
        assert row["step_ms"] == 20.0
        assert row["seconds_min"] >= 4 * 0.020  # four steps, the prefill among them
        assert 0.0 < row["fraction_of_limit"] <= 1.0
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} >= {"device"}
    device = [event for event in events if event["name"] == "execute"]
    assert {event["pid"] for event in device} == {0, 1}
    assert all(event["dur"] == pytest.approx(20_000, abs=1) for event in device)  # microseconds


def test_a_system_that_is_ended_while_it_starts_leaves_no_shared_memory(tiny_model_path: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"problem": "What is 1+1?"}) + "\n")
    settings = Settings("stock_sync", str(tiny_model_path), str(prompts), 2, 4, 16, 64, 4, largest_batch=4)
    system = System(settings, tmp_path / "system", timeout_s=120.0)
    pattern, deadline, seen = f"*{system._tag}*", time.monotonic() + 120.0, []
    try:
        while not seen and time.monotonic() < deadline:
            seen = list(SHARED_MEMORY.glob(pattern))
    finally:
        system.close(at_once=True)
    assert seen, "it was ended before it had any"
    assert not list(SHARED_MEMORY.glob(pattern))
