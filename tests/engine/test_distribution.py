"""On the real model's logits tokens follow the softmax, on one rank or two, as stock vLLM's do; log-probs are right."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.launch import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # three engines, one after the other

WORKER = Path(__file__).with_name("distribution_worker.py")
SYSTEMS = {"one rank": ("ours", None), "two ranks": ("ours", 2), "stock": ("stock", None)}


@pytest.fixture(scope="module")
def draws(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """By system: tokens and logprobs (prompts, samples), reference (prompts, vocabulary) log-probs."""
    out = tmp_path_factory.mktemp("distribution")
    read = {}
    for name, (system, nproc) in SYSTEMS.items():
        file = out / f"{name}.npz"
        done = launch([WORKER, model_path, file, system], nproc=nproc, timeout_s=300)
        assert done.returncode == 0, done.stderr[-4000:]
        read[name] = dict(np.load(file))
    return read


@pytest.mark.parametrize("system", SYSTEMS)
def test_tokens_follow_the_softmax_of_the_models_logits(draws: dict, system: str) -> None:
    for tokens, reference in zip(draws[system]["tokens"], draws[system]["reference"], strict=True):
        expected = np.exp(reference) * len(tokens)
        counts = np.bincount(tokens, minlength=len(expected)).astype(float)
        few = expected < 5  # too few for the chi-square approximation: one cell together
        assert np.count_nonzero(~few) >= 5
        cells = np.append(expected[~few], expected[few].sum())
        assert stats.chisquare(np.append(counts[~few], counts[few].sum()), cells).pvalue > 1e-3


@pytest.mark.parametrize("system", SYSTEMS)
def test_logprobs_are_those_of_a_float64_softmax(draws: dict, system: str) -> None:
    expected = np.take_along_axis(draws[system]["reference"], draws[system]["tokens"].astype(int), axis=1)
    assert np.abs(draws[system]["logprobs"] - expected).max() < 1e-3  # two float32 implementations of the model


def test_one_rank_and_two_draw_the_same_tokens(draws: dict) -> None:
    one, two = draws["one rank"]["tokens"], draws["two ranks"]["tokens"]
    # The logits differ in the order of sums; a token falls on the other side of an edge now and then.
    assert (one == two).mean() > 0.999
