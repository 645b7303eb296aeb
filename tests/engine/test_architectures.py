"""After a sync by the plan an engine computes what it computes after a full reload, bit for bit, whatever the model."""

import json
from pathlib import Path

import pytest

from tests.engine import architectures_worker
from tests.launch import launch

WORKER = Path(architectures_worker.__file__)


@pytest.mark.parametrize(
    ("dtype", "mode", "families"),
    [
        ("bfloat16", "eager", ["llama, biases", "qwen2", "qwen3", "gemma"]),
        *(
            pytest.param(dtype, mode, list(architectures_worker.FAMILIES), marks=pytest.mark.slow)
            for dtype in ("bfloat16", "float32")
            for mode in ("eager", "compiled")
        ),
    ],
)
def test_by_the_plan_as_by_a_reload(dtype: str, mode: str, families: list[str], tmp_path: Path) -> None:
    done = launch([WORKER, tmp_path, dtype, mode, *families], nproc=2, timeout_s=600)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert list(results) == families
        for family, found in results.items():
            assert found["planned"] == (family not in architectures_worker.WITHOUT_A_PLAN), done.stderr[-2000:]
            assert found["num_logits"] > 6 * 8 * 512, family
            assert found["moved"], f"{family}: other weights compute something else"
            assert all(found["equal"].values()), (family, found)
