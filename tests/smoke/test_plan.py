"""scripts/plan.py as a user runs it; and, slower, its plan beside three steps of a run."""

import json
from pathlib import Path

import pytest

from tests.launch import launch


def test_a_plan(tiny_model_path: Path, tmp_path: Path) -> None:
    words = ["configs/grpo_arithmetic.yaml", "--gpus", "2", "--json", tmp_path / "plan.json"]
    done = launch(["scripts/plan.py", *words, f"model.path={tiny_model_path}"], nproc=None, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    for told in ("MEMORY of a rank, GiB", "activations", "KV CACHE of a rank: 1.00 GiB", "bottleneck: "):
        assert told in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["peak_bytes"] == max(parts["all"] for parts in plan["memory_bytes"].values())
    assert all(entry["source"] for name, entry in plan["device"].items() if name.endswith(("_gib", "_tflops")))


def test_what_does_not_fit_is_an_error(tiny_model_path: Path) -> None:
    words = ["configs/grpo_arithmetic.yaml", "--gpus", "1", "--device", "h100", "--prompt-tokens", "20"]
    words += [f"model.path={tiny_model_path}", "rollout.kv_cache_gib=200"]
    done = launch(["scripts/plan.py", *words], nproc=None, timeout_s=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "DOES NOT FIT" in done.stdout and "the most of it KV cache" in done.stderr


@pytest.mark.slow
def test_the_plan_beside_the_truth(tiny_model_path: Path, tmp_path: Path) -> None:
    words = ["configs/grpo_arithmetic.yaml", "--gpus", "2", "--check", "--json", tmp_path / "plan.json"]
    words += [f"model.path={tiny_model_path}", "rollout.enforce_eager=true", "rollout.kv_cache_gib=0.5"]
    done = launch(["scripts/plan.py", *words], nproc=None, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["peak_bytes"] / 2**30 == pytest.approx(plan["measured"]["peak_gib"], rel=0.15)
    assert "| planned | measured |" in done.stdout


@pytest.mark.slow
def test_schedulers_side_by_side(small_vocabulary_model_path: Path, tmp_path: Path) -> None:
    words = ["--model", small_vocabulary_model_path, "--ranks", "2,8", "--tensor-parallel-size", "2", "--batch", "16"]
    words += ["--max-tokens", "24", "--prompt-tokens", "20", "--step-ms", "1", "--repeats", "1"]
    done = launch(["scripts/bench_schedulers.py", *words, "--json", tmp_path / "found.json"], nproc=None, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    two, eight = json.loads((tmp_path / "found.json").read_text())
    assert (two["replicas"], eight["replicas"], eight["ranks_a_process"]) == (1, 4, 4)
    assert eight["steps"] == 4 * two["steps"] > 0 and two["of_fewest"] == 1.0
