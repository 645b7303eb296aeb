"""A policy under LoRA adapters gives the engine, bit for bit, what the policy merged by PEFT gives it."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("lora_worker.py")

# Mean |difference| of log-probs between the engine, merged, and PEFT's own forward, which adds the adapters' products
# to the layer's: in float32 the order of sums alone, in bfloat16 every activation's rounding.
LIMITS = {"float32": 1e-4, "bfloat16": 0.06}


@pytest.fixture(scope="module", params=["float32 untied", pytest.param("bfloat16 tied", marks=pytest.mark.slow)])
def synced(
    request: pytest.FixtureRequest,
    tiny_model_path: Path,
    small_vocabulary_model_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[float, list[dict]]:
    """The limit for this dtype, and what each of two ranks wrote."""
    dtype, head = request.param.split()
    model = tiny_model_path if head == "tied" else small_vocabulary_model_path
    out = tmp_path_factory.mktemp("lora")
    done = launch([WORKER, model, out, dtype], nproc=2, timeout_s=200)
    # The last thing that the ranks do is a check that fails, on both.
    assert done.returncode == 1 and "StaleWeights: after the sync" in done.stderr, done.stderr[-4000:]
    return LIMITS[dtype], [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_the_engine_holds_what_a_sync_of_the_merged_policy_leaves(synced: tuple[float, list[dict]]) -> None:
    for rank in synced[1]:
        assert rank["first"]
        found = rank["beside"]
        assert found["planned"] == found["as_merged"] == found["as_reloaded"] == [True, True]


def test_other_adapters_give_other_weights(synced: tuple[float, list[dict]]) -> None:
    for rank in synced[1]:
        (one, other), base = rank["beside"]["all"], rank["base"]
        assert len({str(each) for each in (base, one, other)}) == 3
        adapted = [before != after for before, after in zip(one, other, strict=True)]
        assert sum(adapted) == 8, "two layers of four fused matrices; embedding, head and norms stay"


def test_the_engine_computes_what_pefts_forward_computes(synced: tuple[float, list[dict]]) -> None:
    limit, ranks = synced
    for rank in ranks:
        assert rank["gap"] < limit


def test_a_sharded_policy_with_adapters_gives_the_same_weights(synced: tuple[float, list[dict]]) -> None:
    for rank in synced[1]:
        assert rank["sharded"] == {"planned": True, "equal": True}


def test_a_refused_adapter_leaves_the_engine_usable(synced: tuple[float, list[dict]]) -> None:
    for rank in synced[1]:
        assert "is DoRA" in rank["refused"]["said"]["dora"] and "lora_bias=False" in rank["refused"]["said"]["bias"]
        assert rank["refused"]["then"] == 1


def test_an_adapter_that_was_left_out_is_named(synced: tuple[float, list[dict]]) -> None:
    for rank in synced[1]:
        assert "is not what the policy sent as model.layers.1.mlp.down_proj.weight" in rank["stale"]
