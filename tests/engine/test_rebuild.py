"""An engine that could not be built leaves nothing in the way of the next, and a closed one keeps nothing."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("rebuild_worker.py")


@pytest.fixture(scope="module")
def results(small_vocabulary_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("rebuild")
    done = launch([WORKER, small_vocabulary_model_path, out], nproc=None, timeout_s=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "rank0.json").read_text())


def test_after_a_failed_build_a_right_config_works(results: dict) -> None:
    assert results["small_cache"]["error"].startswith("ValueError"), results["small_cache"]
    assert results["no_model"]["error"] is not None
    assert results["small_cache"]["threads"] == results["no_model"]["threads"] == []
    assert results["small_cache"]["groups"] <= 3, "the default one and the engine's own, and none of vLLM's"
    assert results["rows"] == 256


def test_closed_engines_keep_no_descriptors_groups_or_memory(results: dict) -> None:
    """Though the variables that hold them live on."""
    first, *_, last = results["held"][1:]  # the first engine of a process starts libraries
    assert last["descriptors"] <= first["descriptors"] + 2, results["held"]
    assert last["groups"] == first["groups"], results["held"]
    cache = results["open"]["bytes"] - last["bytes"]
    assert cache > 2**25, "an open engine's is there, and gone"
    assert last["bytes"] <= first["bytes"] + 2**25, results["held"]
    assert results["default_group"]
