"""Evaluation in the loop leaves the training as it was, and scripts/evaluate.py gives its figures again."""

import json
from pathlib import Path

import pytest

from tests.launch import Completed, launch

SIZE = ["rollout.max_model_len=64", "rollout.max_num_seqs=8", "rollout.kv_cache_gib=0.25", "sampling.max_tokens=8"]
DTYPE = ["rollout.dtype=float32", "model.autocast=no", "rollout.enforce_eager=true"]  # for the same bits twice
TASK = ["evaluation.held_out=0.1", "evaluation.prompts=5", "evaluation.n=2", "optimizer.learning_rate=1e-3"]
CLOCKS = ("_s", "seconds", "_per_s", "_ms", "_fraction", "_gib")


def run(script: str, *words: str) -> Completed:
    done = launch([f"scripts/{script}.py", *SIZE, *DTYPE, *TASK, *words], nproc=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    return done


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clocks(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.endswith(CLOCKS) and not name.startswith("eval/")}


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "eval_samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def training(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # The entropy bonus moves the policy, whatever its rewards.
    words = ["sampling.n=2", "grpo.prompts_per_step=4", "grpo.steps=3", "grpo.entropy_coef=1.0"]
    directory = tmp_path_factory.mktemp("evaluate")
    return [*words, f"model.path={tiny_model_path}", f"run.directory={directory}"]


@pytest.fixture(scope="module")
def evaluated(training: list[str]) -> Path:
    done = run("grpo", *training, "run.name=on", "evaluation.every=2", "wandb.mode=offline")
    assert "in the end: accuracy" in done.stderr and "3 of 3" in done.stdout
    return Path(training[-1].partition("=")[2]) / "on"


@pytest.mark.slow
def test_training_is_the_same_with_evaluation_and_without(training: list[str], evaluated: Path) -> None:
    run("grpo", *training, "run.name=off", "wandb.mode=disabled")
    with_it, without = rows(evaluated), rows(evaluated.parent / "off")
    assert [row["step"] for row in with_it] == [0, 1, 2, 3] and len(without) == 3
    assert ["eval/accuracy" in row for row in with_it] == [True, False, True, True]
    assert [without_clocks(row) for row in with_it[:3]] == [without_clocks(row) for row in without]
    assert len(without_clocks(without[0])) > 15, "something is compared"


def test_what_was_said_is_written_down_and_was_not_trained_on(evaluated: Path) -> None:
    said = samples(evaluated)
    assert [sample["step"] for sample in said] == [0] * 5 + [2] * 5 + [3] * 5
    assert [sample["response"] for sample in said[:5]] != [sample["response"] for sample in said[10:]]
    questions = {sample["prompt"] for sample in said}
    trained = {json.loads(line)["prompt"] for line in (evaluated / "samples.jsonl").read_text().splitlines()}
    assert len(questions) == 5 and len(trained) > 5 and not questions & trained
    (tables,) = evaluated.glob("wandb/offline-run-*/files/media/table/eval")
    assert len(list(tables.iterdir())) == 3


def test_the_script_gives_the_figures_of_the_runs_end_again(evaluated: Path) -> None:
    # The config names the run's own folder, which is not touched: the evaluation gets one of its own.
    again = [f"model.path={evaluated / 'policy'}", "wandb.mode=disabled"]
    done = run("evaluate", str(evaluated / "config.yaml"), *again)
    assert "on 5 prompts of arithmetic, the share of 0.1 that is held out" in done.stderr
    (folder,) = evaluated.parent.glob("eval-*")
    (row,), last = rows(folder), rows(evaluated)[-1]
    for name in ("eval/accuracy", "eval/avg_at_k", "eval/pass_at_k", "eval/response_tokens_mean", "eval/prompts"):
        assert row[name] == pytest.approx(last[name]), name
    answers = [sample["response"] for sample in samples(folder)]
    assert answers == [sample["response"] for sample in samples(evaluated)[10:]]
