"""The engine's sleep on a GPU: the memory goes and comes back, and the tokens after it are the same."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("sleep_worker.py")
KV_CACHE = 4 * 2**30


@pytest.fixture(scope="module", params=["kv_cache", "all"])
def slept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    from tests.gpu.random_llama import write_random_llama

    model, out = tmp_path_factory.mktemp("random-llama"), tmp_path_factory.mktemp("out")
    write_random_llama(model)
    done = launch([WORKER, model, out, request.param], nproc=1, timeout_s=600)
    assert done.returncode == 0, done.stderr[-8000:]
    return request.param, json.loads((out / "rank0.json").read_text())


def test_the_memory_goes(slept: tuple[str, dict]) -> None:
    sleep, found = slept
    given_back = KV_CACHE + (found["weights"] if sleep == "all" else 0)
    assert found["gained"] > 0.9 * given_back
    assert found["again"] == 0, "nothing is left to give back"


def test_it_comes_back_and_the_tokens_are_the_same(slept: tuple[str, dict]) -> None:
    _, found = slept
    assert found["digest_after"] == found["digest"]
    assert abs(found["kept"]) < 2**29


def test_weights_that_were_given_back_need_a_sync(slept: tuple[str, dict]) -> None:
    sleep, found = slept
    assert found["without_a_sync"].startswith(
        "RuntimeError: the engine gave its weights back" if sleep == "all" else ""
    )
    assert bool(found["without_a_sync"]) == (sleep == "all")


def test_a_shortage_says_who_holds_the_memory(slept: tuple[str, dict]) -> None:
    sleep, found = slept
    if sleep == "kv_cache":
        assert found["shortage"].startswith("MemoryError: the engine cannot take its kv_cache again"), found["shortage"]
        assert "Tensors of this process hold" in found["shortage"]
