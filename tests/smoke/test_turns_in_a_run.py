"""A run with an environment in a worker process, which fails now and then; and its evaluation."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("turns_run_worker.py")

# The tiny model talks nonsense and ends its turns by chance: every text is a question.
TEACHER = """
def teacher(episode):
    said = episode.turns[-1]
    if len(said) % 5 == 0:
        raise ValueError("five letters")
    return None if len(episode.turns) > 3 else f"{len(said)} letters. Go on."

def turns(response, answer, sample):
    assert sample.turns[-1] == response and len(sample.turns) % 2 == 1
    return float(len(sample.turns) // 2)
"""


@pytest.mark.slow
def test_a_run_of_several_turns(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TEACHER)
    size = [
        "rollout.max_model_len=128",
        "rollout.max_num_seqs=8",
        "rollout.kv_cache_gib=0.25",
        "sampling.max_tokens=12",
    ]
    environment = [f"environment.function={tmp_path}/mine.py:teacher", "environment.max_turns=3"]
    environment += ["environment.workers=1", "environment.on_error=cut"]
    reward = [f'reward.functions=["{tmp_path}/mine.py:turns"]', "reward.require_finish=false"]
    evaluation = ["evaluation.every=2", "evaluation.held_out=0.2", "evaluation.prompts=2", "evaluation.temperature=0"]
    steps = ["sampling.n=2", "ppo.prompts_per_step=4", "ppo.steps=2", "ppo.kl_coef=0.01", "data.system_prompt="]
    words = [*size, *environment, *reward, *evaluation, *steps, "rollout.enforce_eager=true"]
    run = [f"model.path={tiny_model_path}", f"run.directory={tmp_path}", "run.name=run", "wandb.mode=disabled"]
    done = launch([WORKER, *words, *run], nproc=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps_of_run = [row for row in rows if "rollout/sequences" in row]
    assert len(steps_of_run) == 2
    for row in steps_of_run:
        assert row["rollout/sequences"] == 8 and 1 < row["rollout/turns_mean"] <= 3
        assert row["rollout/observation_tokens"] > 0 and row["train/grad_norm"] > 0
        # A reward a turn after the first.
        assert abs(row["reward/mean"] - (row["rollout/turns_mean"] - 1)) < 1e-6
        assert row["rollout/response_tokens_mean"] * 8 == row["rollout/generated_tokens"]
    assert sum(row["rollout/environment_failed"] for row in steps_of_run) > 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    told = [text for sample in samples for text in sample["turns"][1::2]]
    assert told and all(text.endswith(" letters. Go on.") for text in told)
    for sample in samples:
        for said, text in zip(sample["turns"][::2], sample["turns"][1::2], strict=False):
            assert text.startswith(f"{len(said)} "), "each answer is to the turn before it"
    evaluated = [json.loads(line) for line in (tmp_path / "run" / "eval_samples.jsonl").read_text().splitlines()]
    assert any("letters. Go on." in outcome["response"] for outcome in evaluated)
