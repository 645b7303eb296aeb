"""The split product keeps what rounding to half precision loses."""

import pytest
import torch

from rollout.backend.head import logits_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_half_precision_products_give_float32_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(33, 576, generator=generator).to(dtype)
    weight = (torch.randn(1000, 576, generator=generator) * 0.4).to(dtype)
    exact = hidden_states.double() @ weight.double().t()
    rounded = (logits_of(hidden_states, weight, None).float() - exact).abs().max()
    split = (logits_of(hidden_states, weight, torch.float32).float() - exact).abs().max()
    assert exact.abs().max() > 20
    assert split < 1e-3 < rounded


def test_float32_weights_need_one_product() -> None:
    logits = logits_of(torch.randn(3, 8), torch.randn(5, 8), torch.float32)
    assert logits.low is None and logits.high.shape == (3, 5)
