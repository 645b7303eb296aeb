"""Logits keep what rounding to half precision loses: by two products, or without being written down."""

import numpy as np
import pytest
import torch

from rollout.backend.head import StreamedLogits, head_library, logits_of
from rollout.sampling import BLOCK, OUTSIDE, Logits, candidates, combine, step_seeds

HIDDEN = 576


def head(rows: int, tokens: int, hidden: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (rows, hidden) and weights (tokens, hidden) in bfloat16, whose logits reach 20 and more."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator).bfloat16()
    return states, (torch.randn(tokens, hidden, generator=generator) * 0.4).bfloat16()


@pytest.fixture(scope="module")
def library():
    library = head_library(torch.zeros(BLOCK, HIDDEN, dtype=torch.bfloat16), torch.float32)
    if library is None:
        pytest.skip("needs a compiler and AVX512-BF16")
    return library


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_half_precision_products_give_float32_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(33, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(1000, HIDDEN, generator=generator) * 0.4).to(dtype)
    exact = hidden_states.double() @ weight.double().t()
    rounded = (logits_of(hidden_states, weight, None).float() - exact).abs().max()
    split = (logits_of(hidden_states, weight, torch.float32).float() - exact).abs().max()
    assert exact.abs().max() > 20
    assert split < 1e-3 < rounded


def test_float32_weights_need_one_product() -> None:
    logits = logits_of(torch.randn(3, 8), torch.randn(5, 8), torch.float32)
    assert logits.low is None and logits.high.shape == (3, 5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 33])
@pytest.mark.parametrize("tokens", [1, 63, 64, 130, 1000])
def test_streamed_logits_and_masses_agree_with_float64(library, rows: int, tokens: int) -> None:
    hidden, weight = head(rows, tokens)
    exact = hidden.double() @ weight.double().t()
    streamed = StreamedLogits(library, hidden, weight, tokens)
    for block in range(-(-tokens // BLOCK)):
        logits = streamed.of_blocks(torch.full((rows,), block))
        inside = exact[:, block * BLOCK : (block + 1) * BLOCK]
        torch.testing.assert_close(logits[:, : inside.shape[1]].double(), inside, atol=2e-5, rtol=0)
        assert (logits[:, inside.shape[1] :] == OUTSIDE).all()
    scale = torch.linspace(0.5, 3.0, rows)
    masses, peaks = streamed.log_masses(scale)
    scaled = torch.nn.functional.pad(exact * scale[:, None], (0, -tokens % BLOCK), value=-torch.inf).view(
        rows, -1, BLOCK
    )
    torch.testing.assert_close(masses.double(), scaled.logsumexp(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(peaks.double(), scaled.amax(-1), atol=1e-4, rtol=0)


def test_padding_of_the_weight_is_not_read(library) -> None:
    hidden, weight = head(5, 2 * BLOCK)
    weight[100:] = torch.nan
    masses, peaks = StreamedLogits(library, hidden, weight, 100).log_masses(torch.ones(5))
    assert masses.isfinite().all() and peaks.isfinite().all()


def test_a_streamed_row_does_not_depend_on_its_batch(library) -> None:
    hidden, weight = head(37, 640)
    scale = torch.linspace(0.5, 3.0, 37)
    masses, peaks = StreamedLogits(library, hidden, weight, 640).log_masses(scale)
    for rows in (slice(5, 6), slice(3, 9), slice(36, 37)):
        alone = StreamedLogits(library, hidden[rows].contiguous(), weight, 640).log_masses(scale[rows])
        assert torch.equal(alone[0], masses[rows]) and torch.equal(alone[1], peaks[rows])


def test_streamed_and_written_logits_draw_the_same_tokens(library) -> None:
    hidden, weight = head(500, 6400)
    seeds = step_seeds(np.arange(500, dtype=np.uint64), np.arange(500))
    temperature = torch.ones(500)
    temperature[::7] = 0.0
    written = logits_of(hidden, weight, torch.float32)
    tokens, logprobs = combine(candidates(StreamedLogits(library, hidden, weight, 6400), 0, temperature, seeds)[None])
    other, other_logprobs = combine(candidates(Logits(written.high, written.low), 0, temperature, seeds)[None])
    same = tokens == other
    assert same.float().mean() > 0.99  # a token falls on the other side of an edge now and then
    torch.testing.assert_close(logprobs[same], other_logprobs[same], atol=1e-3, rtol=0)


def test_threads_share_the_work(library) -> None:
    hidden, weight = head(65, 1000)
    streamed = StreamedLogits(library, hidden, weight, 1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = streamed.log_masses(torch.ones(65))
        torch.set_num_threads(3)
        three = streamed.log_masses(torch.ones(65))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


@pytest.mark.parametrize(
    "weight, head_dtype",
    [
        (torch.zeros(64, HIDDEN), torch.float32),
        (torch.zeros(64, HIDDEN, dtype=torch.bfloat16), None),
        (torch.zeros(64, HIDDEN, dtype=torch.bfloat16), torch.bfloat16),
        (torch.zeros(64, 48, dtype=torch.bfloat16), torch.float32),
        (torch.zeros(HIDDEN, 64, dtype=torch.bfloat16).t(), torch.float32),
    ],
    ids=["float32 weights", "no float32 asked for", "bfloat16 asked for", "an odd hidden size", "not contiguous"],
)
def test_other_heads_are_left_to_the_products(weight: torch.Tensor, head_dtype: torch.dtype | None) -> None:
    assert head_library(weight, head_dtype) is None
