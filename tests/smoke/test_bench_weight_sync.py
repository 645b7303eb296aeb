"""scripts/bench_weight_sync.py with a small model: every system takes its turns, and the last sync is right."""

import json
from pathlib import Path

from tests.launch import launch


def test_all_systems_take_turns(small_vocabulary_model_path: Path, tmp_path: Path) -> None:
    report = tmp_path / "sync.json"
    words = ["--model", small_vocabulary_model_path, "--repeats", "2", "--json", report]
    done = launch(["scripts/bench_weight_sync.py", *words], nproc=2, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.left_running == []
    found = json.loads(report.read_text())
    assert found["planned"]
    assert [row["system"] for row in found["rows"]] == ["ours", "sharded", "lora", "reload", "disk", "floor"]
    for row in found["rows"]:
        assert 0 < row["least"] <= row["seconds"] <= row["greatest"]
    assert found["rows"][0]["of_floor"] > 1.0 and found["rows"][5]["of_reload"] < 1.0
    assert "| a plain copy of the same bytes |" in done.stdout
