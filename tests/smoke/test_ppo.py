"""scripts/ppo.py as a user runs it: a whole tiny run, and the mistakes a user makes."""

import json
import re
from pathlib import Path

import pytest

from tests.launch import Completed, launch
from tests.trace_format import check_format, check_nesting, spans_by_track
from trainers.metrics import all_metrics, metric_of
from trainers.workspace import specification, workspace

SMOKE = "configs/smoke.yaml"

# The names of docs/metrics.md that every step of every run logs.
ALWAYS = {
    "reward/mean",
    "rollout/generated_tokens_per_s",
    "rollout/host_gap_fraction",
    "step/seconds",
    "sync/version",
    "train/logprob_gap_mean",
    "train/grad_norm",
    "phase/generate_s",
    "phase/optimize_s",
    "memory/rss_gib",
}


def ppo(*overrides: str, nproc: int | None = 2, timeout_s: float = 240.0) -> Completed:
    return launch(["scripts/ppo.py", *overrides], nproc=nproc, timeout_s=timeout_s)


def check_names(rows: list[dict]) -> None:
    """All that the run logged is in the table of metrics, and all that every run logs is in its rows."""
    logged = set().union(*rows) - {"step"}
    assert [name for name in logged if metric_of(name) is None] == [], "to be added to trainers/metrics.toml"
    of_every_run = [metric for metric in all_metrics().values() if not metric.when]
    assert len(of_every_run) > 35
    assert [metric.name for metric in of_every_run if metric not in map(metric_of, logged)] == []
    for section in specification(workspace("", "", "of this run", logged))["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            pattern = panel["config"].get("metricRegex")
            drawn = re.compile(pattern or "|".join(map(re.escape, panel["config"]["metrics"])))
            assert any(map(drawn.fullmatch, logged)), f"{panel['config']['chartTitle']} would be empty"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_console(done: Completed, folder: Path) -> None:
    """Of a run of two steps whose output goes to a file: these lines of rank 0, and no other from any rank."""
    first, *steps = done.stderr.splitlines()
    assert first.startswith(f"{folder}: starting the engine")
    assert [re.sub(r"[\d,]*\d\.\d+|\d[\d,]+(?= tokens)", "N", line) for line in steps] == [
        f"step {step}/2: reward N, N tokens/s, N s" for step in (1, 2)
    ]
    head, *figures, files, wandb = done.stdout.splitlines()
    assert re.fullmatch(r"  2 of 2 steps in \d+\.\d min +first +last +median", head)
    assert {"reward", "generated tokens/s", "seconds a step", "optimize"} <= {line[:26].strip() for line in figures}
    assert files.split() == ["files", str(folder)] and wandb.startswith("  wandb  offline; to upload: wandb sync ")
    assert "\033" not in done.stdout + done.stderr, "colours, and no terminal"


def check_timeline(file: Path) -> None:
    """Of the second step of a run of two ranks: what each thread does in each phase."""
    events = json.loads(file.read_text())["traceEvents"]
    check_format(events)
    check_nesting(events)
    engine = {"share prompts", "schedule", "wait", "update", "compare ranks"}
    phases = {"sync", "generate", "reward", "no_grad", "optimize"}
    training = {"policy", "reference", "forward", "backward", "clip", "optimizer", "sum statistics"}
    for rank in range(2):
        tracks = {track: names for (of_rank, track), names in spans_by_track(events).items() if of_rank == rank}
        assert tracks["main thread"] == {"step 1"} | phases | engine | training
        assert tracks["execute thread"] == {"launch", "copy weights", "check weights"}
    assert [file.name for file in file.parent.iterdir()] == ["step-00001.json"]


def test_a_run_under_torchrun(tiny_model_path: Path, tmp_path: Path) -> None:
    model = [f"model.path={tiny_model_path}", f"run.directory={tmp_path}"]
    as_a_user = {"VLLM_LOGGING_LEVEL": None, "NO_COLOR": None}
    words = [SMOKE, *model, "run.name=first", "run.progress=true", "wandb.mode=offline", "run.timeline_steps=[1]"]
    done = launch(["scripts/ppo.py", *words], timeout_s=240, env=as_a_user)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    check_console(done, tmp_path / "first")
    rows = metrics(tmp_path / "first")
    assert [row["step"] for row in rows] == [0, 1]
    assert [row["sync/version"] for row in rows] == [0, 1]
    for row in rows:
        assert row.keys() >= ALWAYS
        assert row["train/logprob_gap_mean"] < 0.06  # as in tests/engine/test_weights.py: a random model, bfloat16
    check_names(rows)
    assert rows[0]["rank/0/rss_gib"] != rows[0]["rank/1/rss_gib"]
    for file in ("config.yaml", "environment.json", "samples.jsonl", "reward.png", "phases.png", "policy/config.json"):
        assert (tmp_path / "first" / file).stat().st_size > 0, file
    assert list((tmp_path / "first").glob("wandb/offline-run-*/run-*.wandb"))
    check_timeline(tmp_path / "first" / "timeline" / "step-00001.json")

    # The trained policy is a model like any other, and the resolved config a config: the run goes on from both. In one
    # plain process this time.
    again = [str(tmp_path / "first" / "config.yaml"), f"model.path={tmp_path / 'first' / 'policy'}"]
    changes = ["run.name=second", "ppo.steps=1", "rollout.dtype=float32", "model.autocast=no"]
    done = ppo(*again, *changes, nproc=None)
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = metrics(tmp_path / "second")
    assert row["train/logprob_gap_mean"] < 1e-4


@pytest.mark.slow
def test_grpo_in_shards_under_torchrun(tiny_model_path: Path, tmp_path: Path) -> None:
    task = [f"model.path={tiny_model_path}", f"run.directory={tmp_path}", "run.name=grpo", "run.progress=false"]
    size = ["rollout.max_model_len=64", "rollout.max_num_seqs=8", "rollout.kv_cache_gib=0.25", "sampling.max_tokens=8"]
    kinds = ["grpo.kl_coef=0.01", "grpo.mismatch=truncate", "sampling.n=4", "grpo.prompts_per_step=4", "grpo.steps=2"]
    kinds += ["model.sharding=fsdp2"]
    words = [*task, *size, *kinds, "rollout.enforce_eager=true", "wandb.mode=disabled"]
    done = launch(["scripts/grpo.py", *words], nproc=2, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    rows = metrics(tmp_path / "grpo")
    assert [row["step"] for row in rows] == [0, 1]
    check_names(rows)
    for row in rows:
        assert row.keys() >= ALWAYS | {"train/kl_ref", "train/mismatch_weight", "train/mismatch_cut"}
        assert row["train/kl"] == 0.0, "one update a step: the ratio is 1"
        assert 0.9 < row["train/mismatch_weight"] < 1.1


@pytest.mark.slow
def test_the_default_model_keeps_the_bfloat16_limit(model_path: Path, tmp_path: Path) -> None:
    """The limit that docs/results.md states, on the model that it is stated for."""
    task = ["sampling.max_tokens=16", "data.instruction= Answer with only the number.", "ppo.prompts_per_step=32"]
    done = ppo(SMOKE, *task, f"model.path={model_path}", f"run.directory={tmp_path}", "run.name=gap", "ppo.steps=1")
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = metrics(tmp_path / "gap")
    assert row["train/logprob_gap_mean"] < 0.03


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.max_num_seq=8"], "did you mean rollout.max_num_seqs"),
        (["ppo.steps=three"], "ppo.steps"),
        (["model.path=models/nowhere"], "scripts/prepare_model.py"),
        (["rollout.tensor_parallel_size=3"], "does not divide"),
        (["data.source=DATA", "data.prompt_column=nothing"], "question"),
        (["data.source=DATA", "rollout.max_model_len=40"], "Raise rollout.max_model_len by"),
        (["data.source=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_end_with_one_message_and_code_1(
    overrides: list[str], words: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "What is one and one and one? " * 20, "answer": "3"}) + "\n")
    given = [override.replace("DATA", str(data)) for override in overrides]
    if not any(override.startswith("model.path") for override in given):
        given.append(f"model.path={tiny_model_path}")
    done = ppo(SMOKE, *given, f"run.directory={tmp_path}", timeout_s=90)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "/trainers/" not in done.stderr  # no traceback of ours beside that of torchrun
    assert not (tmp_path / "runs").exists()


def test_heads_that_do_not_divide_name_the_script(tiny_model_path: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model_path / "config.json").read_text()) | {"num_attention_heads": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = ppo(SMOKE, f"model.path={tmp_path}", timeout_s=60)
    assert done.returncode == 1
    assert "python scripts/prepare_model.py --tensor-parallel-size 2" in done.stderr


def test_dry_run_prints_the_resolved_config(tiny_model_path: Path) -> None:
    done = ppo(SMOKE, f"model.path={tiny_model_path}", "ppo.steps=7", "--dry-run", nproc=None, timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert "steps: 7" in done.stdout
    assert "Nothing was trained" in done.stderr
