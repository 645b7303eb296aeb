"""A run with rewards of its own in worker processes, which hang now and then, and with dynamic sampling."""

import json
from pathlib import Path

from tests.launch import launch

# Even first operands have signal, odd ones none; of every fifth length the reward never comes.
FUNCTIONS = """
import time

def signal(response, answer, sample):
    even = int(sample.prompt.split()[2][0]) % 2 == 0
    return float(sample.tokens + len(response)) if even else 0.0

def hangs(response, answer, sample):
    if len(response) % 5 == 0:
        time.sleep(1000)
    return 1.0
"""


def test_a_run_with_rewards_that_hang_and_groups_that_teach_nothing(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    size = ["rollout.max_model_len=64", "rollout.max_num_seqs=8", "rollout.kv_cache_gib=0.25", "sampling.max_tokens=3"]
    paths = ", ".join(f'"{tmp_path}/mine.py:{name}"' for name in ("signal", "hangs"))
    rewards = [f"reward.functions=[{paths}]", "reward.weights=[1.0, 0.5]", "reward.require_finish=false"]
    rewards += ["reward.workers=2", "reward.timeout_s=0.3", "reward.on_error=zero"]
    steps = ["sampling.n=2", "grpo.prompts_per_step=6", "grpo.steps=2", "grpo.minibatches=2", "grpo.filter_groups=true"]
    words = [*size, *rewards, *steps, "grpo.oversample=1", "rollout.enforce_eager=true", "wandb.mode=disabled"]
    run = [f"model.path={tiny_model_path}", f"run.directory={tmp_path}", "run.name=run"]
    done = launch(["scripts/grpo.py", *words, *run], nproc=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert row["rollout/rounds"] in (1, 2)
        assert row["rollout/sequences"] == row["rollout/rounds"] * 6 * 2
        kept = round(row["rollout/kept_groups_fraction"] * row["rollout/rounds"] * 6)
        assert row["rollout/trained_groups"] == min(6, kept)
        assert 0.0 < row["rollout/kept_groups_fraction"] < 1.0
        assert row["train/grad_norm"] > 0
        # Everybody else gets 1 for not hanging.
        assert abs(row["reward/hangs_mean"] - (1 - row["reward/failed"] / row["rollout/sequences"])) < 1e-6
        weighted = row["reward/signal_mean"] + 0.5 * row["reward/hangs_mean"]
        assert abs(row["reward/mean"] - weighted) < 1e-5
    assert sum(row["reward/failed"] for row in rows) > 0
    assert max(row["rollout/rounds"] for row in rows) == 2
