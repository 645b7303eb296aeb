"""Groups with signal are shared out evenly; a rank without any neither hangs the others nor changes the update."""

from pathlib import Path

import pytest
import torch

from tests.distributed import dynamic_sampling_worker as worker
from tests.launch import launch

WORKER = Path(worker.__file__)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("dynamic-sampling")
    for nproc in (2, 1):
        done = launch([WORKER, folder], nproc=nproc, timeout_s=100)
        assert done.returncode == 0, done.stderr[-4000:]
    return {file.stem: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}


@pytest.mark.parametrize("case", worker.CASES)
def test_two_ranks_train_as_one_does_whoever_has_the_groups(ranks: dict[str, dict], case: str) -> None:
    first, second, alone = (ranks[name][case] for name in ("rank0of2", "rank1of2", "rank0of1"))
    signal = worker.CASES[case]
    trained = min(signal, worker.WANTED)
    assert (first["groups"], second["groups"], alone["groups"]) == ((trained + 1) // 2, trained // 2, trained)
    assert first["metrics"]["rollout/trained_groups"] == trained
    assert first["metrics"]["rollout/kept_groups_fraction"] == signal / 8  # four prompts a rank
    assert alone["metrics"]["rollout/kept_groups_fraction"] == signal / 4
    untrained = {name: weights for name, weights in worker.Policy(worker.tiny_llama(seed=0)).named_parameters()}
    for name, weights in first["weights"].items():
        torch.testing.assert_close(weights, second["weights"][name], rtol=0, atol=0)
        assert torch.equal(weights, untrained[name]) == (not trained), name


def test_an_empty_rank_adds_nothing(ranks: dict[str, dict]) -> None:
    """The rows of the one group are the first rank's: its minibatches are those of one rank alone."""
    two, one = ranks["rank0of2"]["one group"], ranks["rank0of1"]["one group"]
    assert ranks["rank1of2"]["one group"]["rows"] == 0 and two["rows"] == one["rows"] == 2
    for name, weights in two["weights"].items():
        torch.testing.assert_close(weights, one["weights"][name], rtol=1e-6, atol=1e-8)
    names = {name for name in one["metrics"] if name.startswith("train/") and not name.endswith("_per_s")}
    assert len(names) > 5
    for name in names:
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5, abs=1e-8), name
