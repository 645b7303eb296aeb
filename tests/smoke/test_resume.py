"""A run that is killed and goes on gives what the run gives that was never stopped, to the last digit."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.launch import Completed, launch
from tests.smoke import resume_worker

WORKER = Path(resume_worker.__file__)
STEPS = 4
SMOKE = ["rollout.max_model_len=64", "rollout.max_num_seqs=8", "rollout.kv_cache_gib=0.25", "sampling.max_tokens=8"]
SMOKE += ["rollout.enforce_eager=true", "run.progress=false", "optimizer.learning_rate=1e-3"]
SMOKE += ["evaluation.every=3", "evaluation.held_out=0.2", "evaluation.prompts=4", "evaluation.n=2"]
OF = {
    "ppo": [*SMOKE, "ppo.prompts_per_step=8", "ppo.kl_coef=0.01", f"ppo.steps={STEPS}", "optimizer.warmup_steps=3"],
    "grpo": [*SMOKE, "grpo.prompts_per_step=4", "sampling.n=2", "grpo.kl_coef=0.01", f"grpo.steps={STEPS}"],
}
# Times, rates and memory: all that may differ.
MEASURED = re.compile(
    r"phase/.*|memory/.*|rank/.*|(.*/)?seconds|.*_per_s|.*_ms|rollout/(host_gap|tail)_fraction|rollout/.*overlap.*"
)


def run(
    model: Path,
    directory: Path,
    *overrides: str,
    algorithm: str = "ppo",
    rows: int = 0,
    seconds: float = 0.0,
    broken: str = "nothing",
    nproc: int = 2,
) -> Completed:
    where = [f"model.path={model}", f"run.directory={directory}", "run.name=run", "wandb.mode=disabled"]
    words = [*OF[algorithm], *where, *overrides]
    return launch([WORKER, algorithm, str(rows), str(seconds), broken, *words], nproc=nproc, timeout_s=150)


def whole(model: Path, directory: Path, *overrides: str, algorithm: str = "ppo", nproc: int = 2) -> list[dict]:
    """The metrics of a run that nobody stops and that writes no checkpoints."""
    done = run(model, directory, *overrides, algorithm=algorithm, nproc=nproc)
    assert done.returncode == 0, done.stderr[-4000:]
    return rows_of(directory / "run")


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def settled(rows: list[dict]) -> list[dict]:
    """What has to be the same: all but times, rates and memory."""
    return [{name: value for name, value in row.items() if not MEASURED.fullmatch(name)} for row in rows]


def killed(model: Path, directory: Path, rows: int, seconds: float, *overrides: str, algorithm: str = "ppo") -> None:
    done = run(model, directory, "checkpoint.every=1", *overrides, algorithm=algorithm, rows=rows, seconds=seconds)
    assert done.returncode == -9, done.stderr[-4000:]


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    whole(tiny_model_path, directory)
    return directory / "run"


@pytest.fixture(scope="module")
def interrupted(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed while it did its third step, or wrote its second checkpoint."""
    directory = tmp_path_factory.mktemp("killed")
    killed(tiny_model_path, directory, rows=2, seconds=random.uniform(0.0, 0.25))
    return directory


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy", symlinks=True)) / "run"


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tiny_model_path: Path, uninterrupted: Path, interrupted: Path, tmp_path: Path
) -> None:
    folder = copied(interrupted, tmp_path)
    with (folder / "samples.jsonl").open("a") as samples:
        samples.write('{"step": 2, "prompt": "cut sh')
    (folder / "failure.json").write_text("{}\n")
    done = run(tiny_model_path, folder.parent, f"checkpoint.resume={folder}", "checkpoint.every=1", "ppo.steps=4")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    assert settled(rows_of(folder)) == settled(rows_of(uninterrupted))
    for name in ("samples.jsonl", "eval_samples.jsonl"):
        assert rows_of(folder, name) == rows_of(uninterrupted, name)
    assert [row["sync/version"] for row in rows_of(folder)[:-1]] == list(range(STEPS))
    assert [row["step"] for row in rows_of(folder) if "eval/accuracy" in row] == [0, 3, STEPS]
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-000003", "step-000004"]
    weights = "policy/model.safetensors"
    assert (folder / weights).read_bytes() == (uninterrupted / weights).read_bytes()
    assert not (folder / "failure.json").exists() and list(folder.glob("failure-before-*.json"))
    assert "resume: null" in (folder / "config.yaml").read_text()

    out = tmp_path / "exported"
    done = launch(["scripts/export.py", folder, out], nproc=None)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{out}: the policy after 4 steps, from {folder}" in done.stdout
    for file in (folder / "policy").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    done = launch(["scripts/export.py", folder, out], nproc=None)
    assert done.returncode == 1 and "exists and is not overwritten" in done.stderr


@pytest.mark.slow
def test_one_rank_goes_on_as_two_and_back(
    tiny_model_path: Path, uninterrupted: Path, interrupted: Path, tmp_path: Path
) -> None:
    folder = copied(interrupted, tmp_path)
    prompts = [(row["step"], row["prompt"]) for row in rows_of(uninterrupted, "samples.jsonl")]
    for steps, nproc, sharding in ((3, 1, "ddp"), (4, 2, "fsdp2")):
        words = ["checkpoint.resume=auto", "checkpoint.every=1", f"ppo.steps={steps}", f"model.sharding={sharding}"]
        done = run(tiny_model_path, folder.parent, *words, nproc=nproc)
        assert done.returncode == 0, done.stderr[-4000:]
        assert [(row["step"], row["prompt"]) for row in rows_of(folder, "samples.jsonl")] == prompts[: steps * 4]
    assert [row["step"] for row in rows_of(folder)] == list(range(STEPS + 1))  # the last one is an evaluation
    again = json.loads((folder / "checkpoints" / "step-000004" / "checkpoint.json").read_text())
    assert (again["position"], again["world_size"]) == (STEPS * 8, 2)


# Three tokens a step of eight: after the second step every rank carries responses of two ages.
CARRIED = ["partial.tokens_per_step=3", "partial.max_age=2", "grpo.old_logprobs=engine", "reward.require_finish=false"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_carried_responses_go_on_where_they_were(tiny_model_path: Path, tmp_path: Path) -> None:
    words = [*CARRIED, "grpo.steps=6"]
    expected = whole(tiny_model_path, tmp_path / "whole", *words, algorithm="grpo")
    steps = [row for row in expected if "rollout/carried" in row]
    assert len(steps) == 6 and all(row["rollout/carried"] > 0 for row in steps)
    trained = [row for row in steps if row["rollout/trained_groups"]]
    assert 3 <= len(trained) < 6 and all(0 < row["rollout/version_lag_mean"] <= 2 for row in trained)
    assert all(("train/loss" in row) == ("reward/mean" in row) == (row in trained) for row in steps)

    killed(tiny_model_path, tmp_path / "killed", 4, 0.1, *words, algorithm="grpo")
    newest = sorted((tmp_path / "killed" / "run" / "checkpoints").glob("step-??????"))[-1]
    assert json.loads((newest / "checkpoint.json").read_text())["carried"] > 0
    for broken in ("carried", "nothing"):
        folder = copied(tmp_path / "killed", tmp_path / broken)
        done = run(
            tiny_model_path,
            folder.parent,
            *words,
            f"checkpoint.resume={folder}",
            "checkpoint.every=1",
            algorithm="grpo",
            broken=broken,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert (settled(rows_of(folder)) == settled(expected)) == (broken == "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("broken", [name for name in resume_worker.BREAKS if name not in ("nothing", "carried")])
def test_it_would_show_if_a_part_were_left_out(
    broken: str, tiny_model_path: Path, uninterrupted: Path, interrupted: Path, tmp_path: Path
) -> None:
    folder = copied(interrupted, tmp_path)
    done = run(tiny_model_path, folder.parent, f"checkpoint.resume={folder}", broken=broken)
    assert done.returncode == 0, done.stderr[-4000:]
    assert settled(rows_of(folder)) != settled(rows_of(uninterrupted))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("algorithm", "adapters"), [("ppo", []), ("grpo", []), ("grpo", ["lora.rank=4", "lora.dropout=0.1"])]
)
def test_killed_five_times_over(algorithm: str, adapters: list[str], tiny_model_path: Path, tmp_path: Path) -> None:
    """Each time somewhere in a step, a checkpoint, or what comes between; then it may go on to its end."""
    more = [f"{algorithm}.steps=8", *adapters]
    expected = whole(tiny_model_path, tmp_path / "whole", *more, algorithm=algorithm)
    kills = random.Random(algorithm)
    directory = tmp_path / "killed"
    words = [*more, "checkpoint.resume=auto"]
    for _ in range(5):
        killed(tiny_model_path, directory, 1, kills.uniform(0.0, 0.4), *words, algorithm=algorithm)
    done = run(tiny_model_path, directory, "checkpoint.every=1", *words, algorithm=algorithm)
    assert done.returncode == 0, done.stderr[-4000:]
    assert settled(rows_of(directory / "run")) == settled(expected)
