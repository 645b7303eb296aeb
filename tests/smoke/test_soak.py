"""scripts/soak.py, a short one: `make soak` runs two thousand phases."""

import json
from pathlib import Path

import pytest

from tests.launch import launch


@pytest.mark.slow
def test_phases_of_all_kinds_leave_nothing_behind(tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    # The first phases fill allocators and caches: what two thousand phases may add is for the long run to say.
    words = ["--phases", "40", "--settled", "30", "--growth", "0.2", "--json", report]
    done = launch(["scripts/soak.py", *words], nproc=2, timeout_s=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.left_running == []
    ranks = json.loads(report.read_text())
    assert [len(phases) for phases in ranks] == [40, 40]
    for phases in ranks:
        assert sum(phase["preemptions"] for phase in phases) > 0
        assert 0 < sum(phase["stopped"] for phase in phases) < sum(phase["sequences"] for phase in phases)
        sizes = [phase["sequences"] for phase in phases]
        assert min(sizes) < 10 and max(sizes) > 64, "small batches, and more than run at once"
