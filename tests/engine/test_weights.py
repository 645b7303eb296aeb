"""After a sync the engine computes what the trainer computes; a part left stale shows."""

import json
from pathlib import Path

import pytest

from tests.launch import launch

WORKER = Path(__file__).with_name("weights_worker.py")

# Mean |difference| of log-probs. float32 differs in the order of sums alone; bfloat16 rounds every activation, of which
# this random model with its large weights makes more than a trained one (docs/results.md has that one's).
LIMITS = {"float32": 1e-4, "bfloat16": 0.06}


@pytest.fixture(
    scope="module",
    params=["float32 tied", pytest.param("bfloat16 tied", marks=pytest.mark.slow), "float32 untied"],
)
def synced(
    request: pytest.FixtureRequest,
    tiny_model_path: Path,
    small_vocabulary_model_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[float, list[dict]]:
    """The limit for this dtype, and what each of two ranks wrote."""
    dtype, head = request.param.split()
    model = tiny_model_path if head == "tied" else small_vocabulary_model_path
    out = tmp_path_factory.mktemp("weights")
    done = launch([WORKER, model, out, dtype], nproc=2, timeout_s=200)
    # The last sync lacks a parameter, on both ranks: a failure, though the script catches it.
    assert done.returncode == 1 and "ValueError: the policy sent no weights" in done.stderr, done.stderr[-4000:]
    return LIMITS[dtype], [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_logprobs_agree_after_a_sync_and_not_before(synced: tuple[float, list[dict]]) -> None:
    limit, ranks = synced
    for rank in ranks:
        assert rank["synced"][0] < limit
        assert rank["before_sync"][0] > 10 * limit


def test_a_stale_part_shows_and_the_next_sync_heals_it(synced: tuple[float, list[dict]]) -> None:
    limit, ranks = synced
    for rank in ranks:
        stale = [name for name in rank if name.startswith("stale ")]
        assert len(stale) >= 4
        for name in stale:
            assert rank[name][0] > 3 * limit, name
            assert rank[name.replace("stale", "healed")][0] < limit, name


def test_logprobs_are_of_the_distribution_sampled_from(synced: tuple[float, list[dict]]) -> None:
    limit, ranks = synced
    for rank in ranks:
        assert rank["tempered_as_plain"][0] > 3 * limit


def test_samples_that_share_a_prefill_get_the_policys_logprobs(synced: tuple[float, list[dict]]) -> None:
    limit, ranks = synced
    for rank in ranks:
        assert rank["grouped"][0] < limit


def test_versions(synced: tuple[float, list[dict]]) -> None:
    for rank in synced[1]:
        assert rank["versions"] == [-1, 7]


def test_a_policy_without_a_parameter_is_refused_and_the_engine_not_used_half_synced(
    synced: tuple[float, list[dict]],
) -> None:
    for rank in synced[1]:
        assert "the policy sent no weights for the engine's" in rank["missing"]
        assert "broken by ValueError while syncing weights" in rank["after_failed_sync"]
