"""Weights that go by a plan are those of a full reload, bit for bit; wrong plans and stale layers are found."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("sync_plan_worker.py")


@pytest.fixture(scope="module", params=["bfloat16 tied", "float32 untied"])
def ranks(
    request: pytest.FixtureRequest,
    tiny_model_path: Path,
    small_vocabulary_model_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict]:
    dtype, head = request.param.split()
    model = tiny_model_path if head == "tied" else small_vocabulary_model_path
    out = tmp_path_factory.mktemp("plan")
    done = launch([WORKER, model, out, dtype], nproc=2, timeout_s=200)
    # The last thing that the ranks do is a sync that fails, on both.
    assert done.returncode == 1 and "StaleWeights: after the sync" in done.stderr, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_a_plan_does_what_a_reload_does(ranks: list[dict]) -> None:
    for rank in ranks:
        assert "sync first" in rank["too_early"], "and the engine can still be used"
        assert rank["first"]
        # The proof loads each layer twice and looks at it four times: a big model's first sync is no standstill.
        assert rank["beats"] >= 6 * rank["equal"]["found"][0]["layers"]
        for found in rank["equal"]["found"]:
            assert found["planned"] and found["equal"] and found["layers"] >= 14


def test_a_sharded_policy_gives_the_same_weights(ranks: list[dict]) -> None:
    assert [rank["sharded"] for rank in ranks] == [{"planned": True, "equal": True}] * 2


@pytest.mark.parametrize("layout", ["rows", "some_plain", "columns", "with_partial_sums"])
def test_layouts_of_all_kinds_give_the_same_weights(ranks: list[dict], layout: str) -> None:
    for rank in ranks:
        found = rank["layouts"][layout]
        assert found["equal"] == [True, True]
        # The second of a layout goes by what the first derived, and gathers only what has no other way.
        assert found["new_routes"] == 0
        # (Partial sums: for the sync, and again where the look at some layers comes to that one.)
        assert found["gathered"] in ((1, 2) if layout == "with_partial_sums" else (0,))
        assert found["memory"] <= 32 * 2**20
    received = [rank["layouts"][layout]["received"] for rank in ranks]
    whole = ranks[0]["layouts"][layout]["whole"]
    # Half of a parameter is missing at most, and only where the engine wants other boxes than the trainer has.
    assert 0 < max(received) < whole, (received, whole)


def test_a_layer_of_a_sharded_policy_that_was_left_out_is_named(ranks: list[dict]) -> None:
    for rank in ranks:
        left_out = rank["layouts"]["left_out"]
        assert len(left_out["named"]) >= 4 and all(left_out["named"])
        assert max(left_out["syncs"]) <= left_out["turns"] + 1


def test_an_exchange_that_goes_wrong_is_not_used(ranks: list[dict]) -> None:
    for rank in ranks:
        for found in rank["lost"].values():
            assert not found["planned"]
            words = "is not what a full reload makes of it", "is not reached by the plan"
            assert any(word in said for word in words for said in found["said"]), found["said"]


def test_a_layer_that_was_left_out_is_named(ranks: list[dict]) -> None:
    for rank in ranks:
        left_out = rank["left_out"]
        assert len(left_out["named"]) >= 4 and all(left_out["named"])
        # Each sync looks at a few layers, in turn: by the time that all had theirs it is found.
        assert max(left_out["syncs"]) <= left_out["turns"] + 1


def test_one_bit_of_one_element_is_named(ranks: list[dict]) -> None:
    for rank in ranks:
        flipped = rank["flipped"]
        assert {each["packed"] for each in flipped} == {True, False}, "both that which oneDNN packs and the rest"
        assert len(flipped) >= 14
        assert [each["place"] for each in flipped if not each["named"]] == []


def test_a_sync_finds_its_own_stale_layer_and_the_engine_stops(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["forgets"]["named"]
        assert rank["forgets"]["syncs"] <= rank["left_out"]["turns"] + 1
        assert "broken by StaleWeights while syncing weights" in rank["forgets"]["then"]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("k_for_v", "is not what a full reload makes of it"),
        ("without_a_norm", "is not reached by the plan"),
        ("none", "a loader of weight does more than copy a rectangle"),
    ],
)
def test_a_wrong_plan_is_not_used(ranks: list[dict], plan: str, words: str) -> None:
    for rank in ranks:
        found = rank["wrong"][plan]
        assert not found["planned"] and found["right"]
        assert any(words in said and "vLLM's reload" in said for said in found["said"]), found["said"]
