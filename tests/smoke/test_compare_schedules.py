"""scripts/compare_schedules.py, both schedules in one engine."""

import re
from pathlib import Path

import pytest

from tests.launch import launch


@pytest.mark.slow
def test_one_engine_runs_both_schedules_and_gives_the_same_tokens(tiny_model_path: Path) -> None:
    words = ["--model", tiny_model_path, "--sequences", "4,8", "--max-tokens", "6", "--repeats", "2"]
    done = launch(
        ["scripts/compare_schedules.py", *words, "--ignore-eos", "--enforce-eager", "--same-engine"],
        nproc=2,
        timeout_s=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # Who goes first changes; without a step in flight nothing can overlap.
    lines = re.findall(r"rank 0 of 2, (\w+), queue of (\d): (\d+) tokens.* overlap ([\d.]+)", done.stdout)
    assert {name for name, *_ in lines} == {"SteadyAsyncScheduler"}
    assert [(depth, tokens) for _, depth, tokens, _ in lines] == [
        *(("2", "24"), ("1", "24"), ("2", "48"), ("1", "48")),
        *(("1", "24"), ("2", "24"), ("1", "48"), ("2", "48")),
    ]
    assert {overlap for _, depth, _, overlap in lines if depth == "1"} == {"0.000"}
    assert re.search(r"^\| 8 \| .* \| .* \| .* \|$", done.stdout, re.MULTILINE)
    assert "same tokens and log-probs" in done.stdout
