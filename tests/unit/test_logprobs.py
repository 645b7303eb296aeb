"""Blockwise log-probs and entropies against sums by hand, plain loops, numerical gradients, and a limit on memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers.logprobs import token_logprobs


def problem(tokens: int = 5, hidden: int = 3, vocabulary: int = 11, dtype: torch.dtype = torch.float64):
    """Random hidden states, head weight and targets; 11 words in blocks of 3 leave a last block of 2."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float):
    """The definition, a token and a word at a time, in Python's floats."""
    logprobs, entropies = [], []
    for state, target in zip(hidden.tolist(), targets.tolist(), strict=True):
        z = [sum(a * b for a, b in zip(state, row, strict=True)) / temperature for row in weight.tolist()]
        normaliser = sum(math.exp(logit) for logit in z)
        p = [math.exp(logit) / normaliser for logit in z]
        logprobs.append(math.log(p[target]))
        entropies.append(-sum(prob * math.log(prob) for prob in p))
    return torch.tensor(logprobs, dtype=torch.float64), torch.tensor(entropies, dtype=torch.float64)


def test_by_hand():
    hidden = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[1.0], [2.0], [5.0]], dtype=torch.float64).log()  # p = 1/8, 2/8, 5/8
    logprobs, entropies = token_logprobs(hidden, weight, torch.tensor([2]), entropy=True, block_elements=1)
    assert logprobs.item() == pytest.approx(math.log(5 / 8), rel=1e-12)
    expected = (1 * math.log(8) + 2 * math.log(4) + 5 * math.log(8 / 5)) / 8
    assert entropies.item() == pytest.approx(expected, rel=1e-12)
    # T = 1/2 squares the weights: 1, 4, 25 of 30.
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([1]), temperature=0.5, block_elements=1)
    assert logprobs.item() == pytest.approx(math.log(4 / 30), rel=1e-12)


@pytest.mark.parametrize("block_elements", [1, 20, 10**6])  # blocks of 3, 4 and all 11 words
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_definition(block_elements: int, temperature: float):
    hidden, weight, targets = problem()
    actual = token_logprobs(hidden, weight, targets, temperature, entropy=True, block_elements=block_elements)
    for ours, expected in zip(actual, naive(hidden, weight, targets, temperature), strict=True):
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use", ["logprobs", "entropies", "both"])
def test_gradients_are_those_of_finite_differences(use: str):
    hidden, weight, targets = problem()

    def outputs(hidden: torch.Tensor, weight: torch.Tensor):
        logprobs, entropies = token_logprobs(hidden, weight, targets, 0.7, entropy=True, block_elements=1)
        return {"logprobs": logprobs, "entropies": entropies, "both": (logprobs, entropies)}[use]

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_temperature_0_counts_as_1():
    arguments = problem()
    torch.testing.assert_close(
        token_logprobs(*arguments, temperature=0.0)[0], token_logprobs(*arguments, temperature=1.0)[0], rtol=0, atol=0
    )


def test_large_logits_neither_overflow_nor_lose_the_target():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[-3e4], [3e4], [0.0], [3e4]], requires_grad=True)
    logprobs, entropies = token_logprobs(hidden, weight, torch.tensor([3]), entropy=True, block_elements=1)
    # Two words share all of the probability: log 1/2 and entropy log 2.
    assert logprobs.item() == pytest.approx(-math.log(2), abs=1e-2)  # float32 at 3e4 resolves 0.002
    assert entropies.item() == pytest.approx(math.log(2), abs=1e-2)
    (logprobs + entropies).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_bf16_products_lose_little_against_float32_ones(master: torch.dtype):
    """Products in bfloat16, by autocast or by the weights, of logits up to 25; targets drawn from the distribution."""
    hidden, weight, _ = problem(tokens=256, hidden=32, vocabulary=300, dtype=master)
    wide_hidden, wide_weight = (t.detach().bfloat16().float().requires_grad_() for t in (hidden, weight))
    log_p = torch.log_softmax(wide_hidden @ wide_weight.T, dim=-1)
    targets = torch.multinomial(log_p.exp().detach(), 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=master == torch.float32):
        logprobs, entropies = token_logprobs(hidden, weight, targets, entropy=True, block_elements=1)
        rounded = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    expected, expected_entropies = log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    assert logprobs.dtype == entropies.dtype == torch.float32

    # A logit d above or below the target's is off by 2^-9 d at most, and d above it is at most -log-prob.
    gap = (logprobs - expected).abs()
    assert (gap <= 2**-8 * (1 - expected)).all()
    assert gap.mean() < 0.1 * (rounded.gather(1, targets[:, None]).squeeze(1) - expected).abs().mean()
    torch.testing.assert_close(entropies, expected_entropies, rtol=0, atol=0.01)

    (logprobs + entropies).mean().backward()
    (expected + expected_entropies).mean().backward()
    for ours, wide in ((hidden, wide_hidden), (weight, wide_weight)):
        assert ours.grad.dtype == master
        atol = 2**-7 * wide.grad.abs().max().item()  # bfloat16 keeps 8 bits
        torch.testing.assert_close(ours.grad.float(), wide.grad, rtol=0, atol=atol)


class Operations(TorchDispatchMode):
    """Names the operations that run under it, and the elements of the largest tensor that one of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_no_tensor_is_larger_than_a_block_the_weight_or_the_hidden_states():
    hidden, weight, targets = problem(tokens=500, hidden=4, vocabulary=1000, dtype=torch.float32)
    saved: list[int] = []
    with (
        Operations() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        logprobs, entropies = token_logprobs(hidden, weight, targets, entropy=True, block_elements=5000)
        (logprobs + entropies).sum().backward()
    assert seen.largest == 5000  # blocks of 500 x 10; weight 1000 x 4, hidden 500 x 4; full logits would be 500 000
    assert max(saved) == 4000  # the weight itself: of the logits nothing is kept


def test_an_entropy_that_is_only_logged_costs_nothing_in_the_backward_pass():
    work = []
    for entropy in (False, True):
        hidden, weight, targets = problem()
        logprobs, _ = token_logprobs(hidden, weight, targets, entropy=entropy)
        with Operations() as seen:
            logprobs.sum().backward()
        work.append([name for name in seen.names if name != "aten.detach.default"])  # of the saved entropies
    assert work[0] == work[1] != []


def test_no_tokens_give_no_log_probs():
    hidden, weight, targets = problem(tokens=0)
    logprobs, entropies = token_logprobs(hidden, weight, targets, entropy=True)
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert not weight.grad.any()


def test_a_frozen_weight_costs_no_gradient_of_its_own_and_the_hidden_states_get_theirs():
    """One product a block less, and no tensor of the weight's size; under adapters the head is frozen."""
    gradients, products = [], []
    gradients, products = [], []
    for frozen in (False, True):
        hidden, weight, targets = problem(vocabulary=40)
        weight.requires_grad_(not frozen)
        logprobs, _ = token_logprobs(hidden, weight, targets, 0.7, block_elements=1)
        with Operations() as seen:
            logprobs.sum().backward()
        gradients.append(hidden.grad)
        products.append(sum(name in ("aten.mm.default", "aten.addmm.default") for name in seen.names))
    assert torch.equal(*gradients) and weight.grad is None
    assert products == [3 * 14, 2 * 14]  # 14 blocks of 3 words: logits, the hidden states' gradient, the weight's
