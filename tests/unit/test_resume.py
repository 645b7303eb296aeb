"""Where a run starts, what may differ from its checkpoint, and what is dropped of what came after."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rollout import RolloutConfig, SamplingConfig, World
from trainers import resume as module
from trainers.checkpoint import About
from trainers.cli import parse
from trainers.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GRPOConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RunConfig,
    WandbConfig,
)
from trainers.data import Example
from trainers.errors import ConfigError
from trainers.hyperparameters import PPOHyperparameters
from trainers.resume import Start, agreed_start, check_same, find_checkpoint, origin_of, recorded, taken

EXAMPLES = [Example([1, 2], "3", "1+2"), Example([4], "4", "4")]
WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
ORIGIN = {"data.source": "sha256:a", "model.path": "sha256:b"}


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model(tmp_path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    return str(folder)


def config_of(model: str, directory: Path, resume: str | None = None, **changes: Any) -> PPOConfig:
    checkpoint = CheckpointConfig(every=1, resume=resume)
    given = {"run": RunConfig(directory=str(directory), name="run", progress=False), "checkpoint": checkpoint}
    return PPOConfig(model=ModelConfig(path=model), **(given | changes))


def about_of(config: PPOConfig, step: int = 2, **changes: Any) -> About:
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # as it is read
    given = {"world_size": 1, "algorithm": "ppo", "config": settings, "origin": ORIGIN} | changes
    return About(step=step, position=8 * step, **given)


def put_checkpoint(folder: Path, about: About) -> Path:
    """A checkpoint as far as this room looks into it; the tensors are another's."""
    checkpoint = folder / "checkpoints" / f"step-{about.step:06d}"
    (checkpoint / "tensors").mkdir(parents=True)
    (checkpoint / "tensors" / "a.safetensors").write_bytes(b"12345")
    (checkpoint / "random.json").write_text("{}")
    content = dataclasses.asdict(about) | {"format": 1, "files": {"a.safetensors": 5}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(content))
    return checkpoint


def put_run(config: PPOConfig, *steps: int) -> Path:
    folder = agreed_start(dataclasses.replace(config, checkpoint=CheckpointConfig(every=1)), EXAMPLES, WORLD).folder
    for step in steps:
        put_checkpoint(folder, about_of(config, step, origin=origin_of(config, EXAMPLES)))
    return folder


# --- which one


def test_a_run_its_checkpoint_and_auto_mean_the_same(model, tmp_path):
    config = config_of(model, tmp_path)
    folder = put_run(config, 2, 10)
    newest = folder / "checkpoints" / "step-000010"
    for resume in (str(folder), str(newest), "auto"):
        start = agreed_start(config_of(model, tmp_path, resume), EXAMPLES, WORLD)
        assert (start.folder, start.step, start.is_new) == (folder, 10, False)
        assert start.checkpoint is not None and start.checkpoint[0] == newest
    (newest / "tensors" / "a.safetensors").write_bytes(b"123")
    assert agreed_start(config_of(model, tmp_path, "auto"), EXAMPLES, WORLD).step == 2
    assert find_checkpoint(folder).name == "step-000002"


def test_auto_starts_where_there_is_nothing_yet(model, tmp_path):
    config = config_of(model, tmp_path, "auto")
    start = agreed_start(config, EXAMPLES, WORLD)
    assert (start.folder, start.step, start.is_new) == (tmp_path / "run", 0, True)
    (start.folder / "metrics.jsonl").write_text('{"step": 0}\n')  # died before its first checkpoint
    start = agreed_start(config, EXAMPLES, WORLD)
    assert (start.step, start.is_new, start.checkpoint) == (0, False, None)
    (start.folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with pytest.raises(ConfigError, match="has 2 steps and no whole checkpoint, though checkpoint.every is 1"):
        agreed_start(config, EXAMPLES, WORLD)


def test_auto_leaves_other_folders_alone(model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is no run's folder; choose another run.name"):
        agreed_start(config_of(model, tmp_path, "auto"), EXAMPLES, WORLD)


@pytest.mark.parametrize(
    ("resume", "words"),
    [("RUNS/nowhere", "is no folder"), ("RUNS", "has no whole checkpoint"), ("RUNS/run", "has no whole checkpoint")],
)
def test_nothing_to_resume(resume, words, model, tmp_path):
    put_run(config_of(model, tmp_path))
    with pytest.raises(ConfigError, match=words):
        agreed_start(config_of(model, tmp_path, resume.replace("RUNS", str(tmp_path))), EXAMPLES, WORLD)


def test_a_checkpoint_out_of_its_run_does_not_go_on(model, tmp_path):
    config = config_of(model, tmp_path)
    alone = put_checkpoint(tmp_path / "elsewhere", about_of(config))
    with pytest.raises(ConfigError, match="does not lie in the checkpoints/ of a run's folder"):
        agreed_start(config_of(model, tmp_path, str(alone)), EXAMPLES, WORLD)


# --- with which config

SMALLER = PPOHyperparameters(steps=5, micro_batch_tokens=512)


def test_what_may_differ(model, tmp_path, capsys):
    before = config_of(model, tmp_path, rollout=RolloutConfig(max_num_seqs=8))
    now = config_of(
        "elsewhere",
        tmp_path / "moved",
        "auto",
        ppo=SMALLER,
        rollout=RolloutConfig(max_num_seqs=4, kv_cache_gib=0.5),
        data=DataConfig(source="moved.jsonl"),
        wandb=WandbConfig(mode="offline"),
        run=RunConfig(name="other"),
    )
    now = dataclasses.replace(now, model=dataclasses.replace(now.model, sharding="fsdp2", reduce_gradients="update"))
    check_same(about_of(before), now, ORIGIN, world_size=2)
    said = capsys.readouterr().err
    assert "rollout.kv_cache_gib, rollout.max_num_seqs, 2 ranks instead of 1): the same run, but not to the" in said
    assert "(model.reduce_gradients, model.sharding, ppo.micro_batch_tokens" in said
    assert "model.path" not in said and "steps" not in said
    check_same(about_of(before), before, ORIGIN, world_size=1)
    assert capsys.readouterr().err == ""


def test_what_may_not_is_named_with_both_values(model, tmp_path):
    before = config_of(model, tmp_path)
    now = config_of(
        model,
        tmp_path,
        optimizer=OptimizerConfig(learning_rate=0.5),
        sampling=SamplingConfig(n=2),
        ppo=PPOHyperparameters(prompts_per_step=64),
        data=DataConfig(seed=1),
    )
    with pytest.raises(ConfigError) as error:
        check_same(about_of(before), now, ORIGIN, 1)
    for words in (
        "optimizer.learning_rate was 1e-05 and is 0.5",
        "sampling.n was 1 and is 2",
        "ppo.prompts_per_step was 128 and is 64",
        "data.seed was 0 and is 1",
        "Set what it was",
    ):
        assert words in str(error.value)
    assert str(error.value).count(" was ") == 4


def test_other_prompts_and_other_weights_are_refused_wherever_they_lie(model, tmp_path):
    config = config_of(model, tmp_path)
    origin = origin_of(config, EXAMPLES)
    check_same(about_of(config, origin=origin), config, origin_of(config, list(EXAMPLES)), 1)
    others = [EXAMPLES[0], Example([4], "5", "4")]
    with pytest.raises(ConfigError, match=r"data.source \('arithmetic'\) holds something else than the run began"):
        check_same(about_of(config, origin=origin), config, origin_of(config, others), 1)
    weights = Path(model) / "model.safetensors"
    weights.write_bytes(os.urandom(100_000))
    with pytest.raises(ConfigError, match="model.path .* holds something else"):
        check_same(about_of(config, origin=origin), config, origin_of(config, EXAMPLES), 1)


def test_another_algorithm_and_too_few_steps_are_refused(model, tmp_path):
    config = config_of(model, tmp_path)
    with pytest.raises(ConfigError, match="is of a run of ppo; go on with scripts/ppo.py"):
        check_same(about_of(config), GRPOConfig(), ORIGIN, 1)
    few = config_of(model, tmp_path, ppo=PPOHyperparameters(steps=1))
    with pytest.raises(ConfigError, match="ppo.steps is 1, but the checkpoint has done 2; raise ppo.steps"):
        check_same(about_of(config), few, ORIGIN, 1)


def test_a_key_that_came_later_had_its_default(model, tmp_path):
    config = config_of(model, tmp_path)
    about = about_of(config)
    del about.config["ppo"]["dual_clip"]
    check_same(about, config, ORIGIN, 1)
    other = config_of(model, tmp_path, ppo=PPOHyperparameters(dual_clip=3.0))
    with pytest.raises(ConfigError, match="ppo.dual_clip was None and is 3.0"):
        check_same(about, other, ORIGIN, 1)


@pytest.mark.parametrize("key", [*module.FREE_KEYS, *module.FREE_PATHS, *module.FREE_MEANS])
def test_the_lists_name_keys_that_exist(key):
    known = module._flat(dataclasses.asdict(PPOConfig()))
    assert any(name.startswith(key.replace("ALGORITHM", "ppo")) for name in known), key


# --- in the same folder


def test_the_folder_is_one_jobs_alone(model, tmp_path):
    config = config_of(model, tmp_path)
    start = Start(put_run(config, 2), ORIGIN, is_new=False)
    script = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", script, str(start.folder)]
    with taken(start, config, WORLD):
        with pytest.raises(ConfigError, match="another job writes to"), taken(start, config, WORLD):
            pass
        other = subprocess.run(command, capture_output=True, text=True)
        assert other.returncode == 1 and "BlockingIOError" in other.stderr
    with taken(start, config, WORLD):
        pass


def test_config_and_surroundings_are_recorded_anew_and_failures_kept(model, tmp_path):
    config = config_of(model, tmp_path)
    folder = put_run(config, 2)
    (folder / "failure.json").write_text("why")
    (folder / "checkpoints" / "step-000003.part").mkdir()
    longer = config_of(model, tmp_path, "auto", ppo=PPOHyperparameters(steps=77))
    start = agreed_start(longer, EXAMPLES, WORLD)
    with taken(start, longer, WORLD):
        pass
    assert parse(PPOConfig, [str(folder / "config.yaml")])[0].ppo.steps == 77
    assert (folder / "failure-before-2.json").read_text() == "why" and not (folder / "failure.json").exists()
    assert json.loads((folder / "environment-2.json").read_text())["world_size"] == 1
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-000002"]


def test_a_run_started_from_config_yaml_is_a_new_one(model, tmp_path):
    assert "resume: null" in recorded(config_of(model, tmp_path, "auto"))


@pytest.mark.parametrize("end", ["", '{"step": 3, "rewa', '{"step": 3}', '[1]\n{"step": 0}\n'])
def test_rows_and_checkpoints_after_the_step_are_dropped(end, model, tmp_path):
    config = config_of(model, tmp_path)
    folder = put_run(config, 1, 2, 3)
    rows = "".join(f'{{"step": {step}, "loss": "NaN"}}\n' for step in (0, 0, 1))
    for name in module.ROWS_FILES:
        (folder / name).write_text(rows + '{"step": 2}\n' * 2 + end)
    module._cut_back(folder, 2)
    for name in module.ROWS_FILES:
        assert (folder / name).read_text() == rows
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-000001", "step-000002"]


# --- what binds, and what does not


def test_every_key_of_rollout_is_known_to_bind_or_not_to():
    free = {key.removeprefix("rollout.") for key in module.FREE_MEANS if key.startswith("rollout.")}
    keys = {key.name for key in dataclasses.fields(RolloutConfig)}
    assert free | set(module.BINDING_ROLLOUT_KEYS) == keys and not free & set(module.BINDING_ROLLOUT_KEYS)


def test_a_key_that_is_accepted_may_change_what_is_learned(model, tmp_path, capsys):
    about = about_of(config_of(model, tmp_path))
    slower = OptimizerConfig(learning_rate=1e-7)
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate was .* in checkpoint.accept"):
        check_same(about, config_of(model, tmp_path, optimizer=slower), ORIGIN, 1)
    accepting = CheckpointConfig(every=1, accept=["optimizer.learning_rate"])
    speaking = RunConfig(directory=str(tmp_path), name="run")
    check_same(about, config_of(model, tmp_path, optimizer=slower, checkpoint=accepting, run=speaking), ORIGIN, 1)
    assert "as another run (checkpoint.accept): optimizer.learning_rate was" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="ppo.clip_range was"):
        other = config_of(model, tmp_path, ppo=PPOHyperparameters(clip_range=0.3), checkpoint=accepting)
        check_same(about, other, ORIGIN, 1)
    with pytest.raises(ConfigError, match="checkpoint.accept has 'learning_rate', which is no key"):
        typo = CheckpointConfig(every=1, accept=["learning_rate"])
        check_same(about, config_of(model, tmp_path, checkpoint=typo), ORIGIN, 1)


def test_another_share_held_out_is_named(model, tmp_path):
    about = about_of(config_of(model, tmp_path))
    other = config_of(model, tmp_path, evaluation=EvaluationConfig(held_out=0.3))
    with pytest.raises(ConfigError, match=r"began with \(evaluation.held_out was 0.0 and is 0.3\)"):
        check_same(about, other, ORIGIN | {"data.source": "sha256:other"}, 1)
