"""Sampling from shards: the right distribution, the right log-probs, the same tokens however it is cut."""

import numpy as np
import pytest
import torch
from scipy import stats

from rollout.sampling import (
    BLOCK,
    Logits,
    block_log_masses,
    candidates,
    combine,
    in_tiles,
    splitmix64,
    step_seeds,
    uniforms,
)

ROWS = 20_000


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: np.ndarray, cuts: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probs of logits (rows, vocabulary), the vocabulary cut into shards at `cuts`."""
    edges = [0, *cuts, logits.shape[1]]
    everyones = []
    for start, end in zip(edges, edges[1:], strict=False):
        everyones.append(candidates(Logits(logits[:, start:end].contiguous()), start, temperature, seeds))
    return combine(torch.stack(everyones))


def peaked(vocabulary: int, generator_seed: int = 0) -> torch.Tensor:
    """Logits of one row whose probabilities span many orders of magnitude, as a language model's do."""
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.randn(vocabulary, generator=generator) * 3.0


@pytest.mark.parametrize("cuts", [(), (192,), (64, 128, 320)], ids=["1 rank", "2 ranks", "4 ranks"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_tokens_follow_the_softmax(cuts: tuple[int, ...], temperature: float) -> None:
    logits = peaked(400)
    seeds = step_seeds(np.arange(ROWS, dtype=np.uint64), np.full(ROWS, 3))
    tokens, _ = draw(logits.expand(ROWS, -1), torch.full((ROWS,), temperature), seeds, cuts)
    expected = (logits.double() / temperature).softmax(-1).numpy() * ROWS
    counts = np.bincount(tokens.numpy(), minlength=400).astype(float)
    # Cells that expect too few for the chi-square approximation are one cell together.
    few = expected < 5
    observed = np.append(counts[~few], counts[few].sum())
    assert stats.chisquare(observed, np.append(expected[~few], expected[few].sum())).pvalue > 1e-3


def test_successive_positions_of_one_sequence_are_independent() -> None:
    logits = torch.zeros(4)
    seeds = step_seeds(np.zeros(ROWS, np.uint64), np.arange(ROWS))
    tokens = draw(logits.expand(ROWS, -1), torch.ones(ROWS), seeds)[0].numpy()
    pairs = np.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16)
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_logprobs_agree_with_float64() -> None:
    logits = peaked(64 * 300).expand(50, -1)
    temperature = torch.linspace(0.3, 2.0, 50)
    tokens, logprobs = draw(logits, temperature, step_seeds(np.arange(50, dtype=np.uint64), np.zeros(50, int)), (6400,))
    expected = (logits.double() / temperature[:, None].double()).log_softmax(-1)[torch.arange(50), tokens]
    assert (logprobs - expected).abs().max() < 5e-6


def test_two_halves_of_logits_are_their_sum() -> None:
    full = peaked(640).expand(100, -1)
    high = full.bfloat16()
    low = (full - high.float()).bfloat16()
    seeds = step_seeds(np.arange(100, dtype=np.uint64), np.zeros(100, int))
    tokens, logprobs = combine(candidates(Logits(high, low), 0, torch.ones(100), seeds)[None])
    expected = (high.double() + low.double()).log_softmax(-1)[torch.arange(100), tokens]
    assert (logprobs - expected).abs().max() < 5e-6
    assert (logprobs - high.double().log_softmax(-1)[torch.arange(100), tokens]).abs().max() > 1e-3


@pytest.mark.parametrize("cuts", [(320,), (64, 384)])
def test_the_same_tokens_on_any_number_of_ranks(cuts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 640, generator=generator) * 3
    seeds = step_seeds(np.arange(500, dtype=np.uint64), np.arange(500))
    whole, whole_logprobs = draw(logits, torch.ones(500), seeds)
    cut, cut_logprobs = draw(logits, torch.ones(500), seeds, cuts)
    assert torch.equal(whole, cut)
    torch.testing.assert_close(whole_logprobs, cut_logprobs, atol=1e-5, rtol=0)


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 640, generator=generator)
    seeds = step_seeds(np.arange(64, dtype=np.uint64), np.arange(64))
    whole = draw(logits, torch.ones(64), seeds)[0]
    order = torch.randperm(64, generator=generator)[:17]
    assert torch.equal(draw(logits[order], torch.ones(17), seeds[order.numpy()])[0], whole[order])


def test_shards_that_begin_inside_a_block_still_follow_the_softmax() -> None:
    logits = peaked(300)
    seeds = step_seeds(np.arange(ROWS, dtype=np.uint64), np.zeros(ROWS, int))
    tokens, _ = draw(logits.expand(ROWS, -1), torch.ones(ROWS), seeds, cuts=(100, 217))
    expected = logits.double().softmax(-1).numpy() * ROWS
    counts = np.bincount(tokens.numpy(), minlength=300).astype(float)
    few = expected < 5
    observed = np.append(counts[~few], counts[few].sum())
    assert stats.chisquare(observed, np.append(expected[~few], expected[few].sum())).pvalue > 1e-3


@pytest.mark.parametrize("cuts", [(), (256,)])
def test_greedy_takes_the_first_likeliest_token(cuts: tuple[int, ...]) -> None:
    logits = torch.zeros(3, 512)
    logits[0, 300] = 5.0
    logits[1, [100, 400]] = 5.0
    seeds = step_seeds(np.arange(3, dtype=np.uint64), np.zeros(3, int))
    tokens, logprobs = draw(logits, torch.zeros(3), seeds, cuts)
    assert tokens.tolist() == [300, 100, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), atol=1e-5, rtol=0)


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = peaked(256).expand(2000, -1)
    temperature = torch.ones(2000)
    temperature[::2] = 0.0
    tokens, _ = draw(logits, temperature, step_seeds(np.arange(2000, dtype=np.uint64), np.zeros(2000, int)), (128,))
    assert set(tokens[::2].tolist()) == {int(logits[0].argmax())}
    assert len(set(tokens[1::2].tolist())) > 20


def test_padding_is_never_drawn_and_has_no_mass() -> None:
    padded = torch.full((2000, 2 * BLOCK), 50.0)  # what lies behind the shard's end is anything
    padded[:, :100] = 0.0
    seeds = step_seeds(np.arange(2000, dtype=np.uint64), np.zeros(2000, int))
    tokens, logprobs = combine(candidates(Logits(padded, size=100), 0, torch.ones(2000), seeds)[None])
    assert tokens.max() < 100
    assert len(set(tokens.tolist())) == 100
    torch.testing.assert_close(logprobs, torch.full((2000,), -np.log(100.0), dtype=torch.float32))


def test_tiles_and_the_whole_are_the_same() -> None:
    logits = peaked(640).repeat(1000, 1)
    scale = torch.linspace(0.5, 2.0, 1000)
    assert torch.equal(in_tiles(logits, None, scale), block_log_masses(logits, None, scale))


def test_uniforms_are_inside_zero_and_one_and_uniform() -> None:
    draws = uniforms(step_seeds(np.arange(100, dtype=np.uint64), np.zeros(100, int)), np.arange(1000))
    assert draws.min() > 0.0 and draws.max() < 1.0
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    assert len(np.unique(draws)) == draws.size


def test_splitmix64_of_the_reference_implementation() -> None:
    # The first outputs for seed 1234567, as published with the Java and C reference implementations.
    states = (np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
