"""scripts/bench_step.py as a user runs it, with a small model; and beside a peer that only prints what TRL's would."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

PEER = """
import json, os, sys, time
held = b"x" * (256 << 20)
time.sleep(1.5)
if os.environ["RANK"] == "0":
    steps = int(sys.argv[sys.argv.index("--steps") + 1])
    print(json.dumps({"system": "a peer", "step_s": [9.0] + [8.0] * (steps - 1), "generate": [3.0] * steps,
                      "sync_weights": [1.0] * steps}), flush=True)
"""


@pytest.mark.slow
def test_both_systems_in_turns(tiny_model_path: Path, tmp_path: Path) -> None:
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)
    words = ["--model", tiny_model_path, "--pairs", "1", "--steps", "1", "--json", tmp_path / "found.json"]
    overrides = ["rollout.enforce_eager=true", "rollout.kv_cache_gib=0.5"]
    done = launch(["scripts/bench_step.py", *words, "--peer", peer, *overrides], nproc=None, timeout_s=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    found = json.loads((tmp_path / "found.json").read_text())
    seconds = {(row["system"], row["part"]): row["seconds"] for row in found["rows"]}
    assert seconds["TRL", "step"] == 8.0 and seconds["TRL", "train"] == 4.0
    assert 0 < seconds["ours", "generate"] < seconds["ours", "step"]
    assert found["of_trl"] == [pytest.approx(seconds["ours", "step"] / 8.0)]
    assert all(row["peak_gib"] > 0.25 for row in found["rows"]), "what the peer holds, and less than ours takes"
    assert "| ours |" in done.stdout and "Our step / TRL's" in done.stdout


def test_a_peer_that_is_not_there(tmp_path: Path) -> None:
    done = launch(["scripts/bench_step.py", "--peer", tmp_path / "nowhere.py"], nproc=None, timeout_s=60)
    assert done.returncode == 2 and "which is not a file" in done.stderr
