"""The files in docs/library.md run as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from tests.launch import ROOT, launch
from trainers.cli import parse
from trainers.config import GRPOConfig
from trainers.reward_functions import Sample, Task, judge, load_functions

PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
MODEL = "models/smollm2-135m-tp2"


def written(name: str, folder: Path, model: Path | None = None) -> Path:
    """The block that begins with `# NAME`, as a file; with a smaller model."""
    (block,) = re.findall(rf"```python\n(# {re.escape(name)}\b.*?)```", PAGE, re.DOTALL)
    if model is not None:
        assert f'"{MODEL}"' in block
        block = block.replace(MODEL, str(model))
    (folder / name).write_text(block)
    return folder / name


def command_of(name: str) -> list[str]:
    """The words of the command line that the page starts a file with."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith("    .venv/bin/torchrun") and name in line]
    return shlex.split(line)


@pytest.mark.slow
def test_a_trainer_of_ones_own(tiny_model_path: Path, tmp_path: Path) -> None:
    done = launch([written("reinforce.py", tmp_path, tiny_model_path)], nproc=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    said = re.findall(
        r"^rank (\d), step (\d): reward (-[\d.]+), version (\d), gap ([\d.]+)$", done.stdout, re.MULTILINE
    )
    assert [(rank, step, version) for rank, step, _, version, _ in said] == [
        (rank, step, step) for rank in "01" for step in "012"
    ]
    assert all(float(gap) < 0.06 for *_, gap in said)  # as in test_weights.py: the engine has what was trained


def test_a_reward_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("mine.py", tmp_path)
    words = command_of("mine.py")
    config, _ = parse(GRPOConfig, words[words.index("scripts/grpo.py") + 1 :])
    monkeypatch.chdir(tmp_path)
    functions = load_functions(config.reward.functions)
    assert judge(functions, Task("It is 7.", "7", Sample("3+4?", finished=True, tokens=10))) == [1.0, 0.9]
    assert judge(functions, Task("It is 8", "7", Sample("3+4?", finished=False, tokens=10))) == [0.0, 0.0]


@pytest.mark.slow
def test_an_algorithm_of_ones_own(tiny_model_path: Path, tmp_path: Path) -> None:
    script = written("best_of_n.py", tmp_path)
    words = command_of("best_of_n.py")
    size = [
        "rollout.max_num_seqs=8",
        "rollout.kv_cache_gib=0.25",
        "rollout.enforce_eager=true",
        "sampling.max_tokens=8",
    ]
    run = [
        "grpo.prompts_per_step=4",
        f"model.path={tiny_model_path}",
        f"run.directory={tmp_path}",
        "wandb.mode=disabled",
    ]
    done = launch([script, *words[words.index("best_of_n.py") + 1 :], *size, *run], nproc=2, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "4 of 4 steps" in done.stdout
