"""Log-probs and entropies of response tokens, straight from hidden states: no (tokens, vocabulary) tensor is made.

The language model's head multiplies (tokens, hidden) by (vocabulary, hidden) to logits that are as wide as the
vocabulary: at 64 x 110 tokens, 49 152 words and float32 that is 1.4 GB, and autograd keeps several such tensors. Here
the head goes through the vocabulary in blocks and keeps, per token, a running log-sum-exp; the backward pass computes
each block again (as Cut Cross-Entropy does, Wijmans et al. 2025, arXiv:2411.09009).

Why blocks of the vocabulary and not of the tokens: each block then owns its rows of the weight's gradient. With blocks
of tokens every block adds to the whole of it, 113 MB here. Measured, forward and backward, 2048 tokens x 576 hidden x
49 152 vocabulary, bf16 autocast, one thread of an AMD EPYC (Zen 4, AVX512-BF16, 32 MiB cache), CPU seconds, best of 3:

    torch.utils.checkpoint over blocks of 128, 256, 512 tokens    3.21, 3.99, 4.09
    autograd.Function over blocks of 128, 256, 512 tokens         2.93, 2.69, 2.83
    autograd.Function over blocks of 512, 2048, 8192 entries      2.56, 2.48, 2.51   (this file)
    its four matrix products alone                                2.13

With the entropy too 2.49, with a gradient through it 2.54.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# 16 MiB of float32: a block stays in the cache from its product to its last use. On a busy machine, sharing that cache,
# blocks of 4 times the size took a quarter longer.
BLOCK_ELEMENTS = 2**22


def token_logprobs(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of each target token, and the entropy of the distribution it was drawn from.

        z = hidden @ head_weight.T / temperature
        logprob = z[target] - logsumexp(z),   entropy = logsumexp(z) - sum of softmax(z) * z

    The products run in the autocast dtype, or without autocast in the weight's; everything after them in float32.

    Args:
        hidden: (tokens, hidden) float, the last hidden states at the positions that predict the targets.
        head_weight: (vocabulary, hidden) float, of the language model's head; a tied embedding will do.
        targets: (tokens,) int64.
        temperature: of the sampling, divides the logits. 0 (greedy) counts as 1: a certain choice has no gradient.
        entropy: True computes the entropies too.
        block_elements: largest number of logits held at once, unless the hidden states are more.

    Returns:
        logprobs (tokens,) and entropies (tokens,) or None, natural log, float32 (float64 if the products are).
        Gradients flow to `hidden` and `head_weight` from both.

    >>> hidden, weight = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])  # logits (0, 0) and (0, 1)
    >>> logprobs, entropies = token_logprobs(hidden, weight, torch.tensor([0, 1]), entropy=True)
    >>> logprobs.exp(), entropies  # 1/2 and e / (1 + e); log 2 and log(1 + e) - e / (1 + e)
    (tensor([0.5000, 0.7311]), tensor([0.6931, 0.5822]))
    """
    assert hidden.dim() == 2 and targets.shape == hidden.shape[:1] and head_weight.shape[1] == hidden.shape[1]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
    # A block narrower than the hidden states would save nothing: they are in memory anyway.
    block = max(block_elements // max(len(hidden), 1), hidden.shape[1])
    return _BlockwiseLogprobs.apply(hidden, head_weight, targets, temperature or 1.0, entropy, dtype, block)


class _BlockwiseLogprobs(torch.autograd.Function):
    """`token_logprobs` over blocks of the vocabulary, each computed in the forward and again in the backward pass.

    With p = softmax(z), L = logprob and H = entropy of a token, and g and h the gradients of the loss by L and H:

        dL/dz_i = [i = target] - p_i,   dH/dz_i = -p_i * (log p_i + H)
        dloss/dz_i = g * [i = target] - p_i * (g + h * (log p_i + H))
    """

    @staticmethod
    def forward(ctx: Any, hidden, head_weight, targets, temperature, entropy, dtype, block):
        ctx.set_materialize_grads(False)  # None, not zeros, for an entropy that is only logged
        x = hidden.to(dtype)
        target_logits = torch.zeros_like(x[:, 0], dtype=_wide(dtype))
        # Of the blocks so far: log-sum-exp, and the entropy of the softmax over them alone.
        lse = torch.full_like(target_logits, -torch.inf)
        entropies = torch.zeros_like(target_logits) if entropy else None
        for _, start, z in _logit_blocks(x, head_weight, temperature, block):
            column, inside = _columns(targets, start, z.shape[1])
            target_logits += torch.where(inside, z.gather(1, column).squeeze(1), 0.0)
            top = z.amax(dim=1)
            z.sub_(top[:, None])
            p = z.exp() if entropy else z.exp_()  # the block's softmax but for the factor 1 / total
            total = p.sum(dim=1)
            block_lse = top + total.log()
            lse, old_lse = torch.logaddexp(lse, block_lse), lse
            if entropies is not None:
                # Two parts with weights u + v = 1: H = u H_u + v H_v - u log u - v log v. All terms are positive, so
                # small entropies keep their digits, which log-sum-exp less the mean logit would not.
                block_entropies = total.log() - p.mul_(z).sum(dim=1) / total
                u, v = torch.exp(old_lse - lse), torch.exp(block_lse - lse)
                entropies = u * entropies + v * block_entropies + torch.special.entr(u) + torch.special.entr(v)
        # The weight is saved as it is, no copy in the autocast dtype: the parameter is in memory anyway.
        ctx.save_for_backward(x, head_weight, targets, lse, entropies)
        ctx.temperature, ctx.block, ctx.hidden_dtype = temperature, block, hidden.dtype
        return target_logits - lse, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs, grad_entropies):
        x, head_weight, targets, lse, entropies = ctx.saved_tensors
        grad_x = torch.zeros_like(x, dtype=lse.dtype)
        grad_weight = torch.empty_like(head_weight)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)
        for weight, start, z in _logit_blocks(x, head_weight, ctx.temperature, ctx.block):
            log_p = z.sub_(lse[:, None])
            if grad_entropies is None:
                grad_z = log_p.exp_().mul_(-grad_logprobs[:, None])
            else:
                slope = (log_p + entropies[:, None]).mul_(-grad_entropies[:, None]).sub_(grad_logprobs[:, None])
                grad_z = log_p.exp_().mul_(slope)
            column, inside = _columns(targets, start, z.shape[1])
            grad_z.scatter_add_(1, column, torch.where(inside, grad_logprobs, 0.0)[:, None])
            if ctx.temperature != 1.0:
                grad_z.div_(ctx.temperature)
            grad_logits = grad_z.to(x.dtype)
            grad_x += grad_logits @ weight
            grad_weight[start : start + len(weight)] = grad_logits.T @ x
        return grad_x.to(ctx.hidden_dtype), grad_weight, None, None, None, None, None


def _logit_blocks(
    x: torch.Tensor, head_weight: torch.Tensor, temperature: float, block: int
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Per block of the vocabulary: its weights in x's dtype, its first entry, its (tokens, block) wide logits / T."""
    for start in range(0, len(head_weight), block):
        weight = head_weight[start : start + block].to(x.dtype)
        z = _wide_product(x, weight)
        yield weight, start, z if temperature == 1.0 else z.div_(temperature)


def _wide_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, its result not rounded to half precision: bfloat16 logits between 16 and 32 are 0.125 apart."""
    if x.dtype in (torch.float32, torch.float64):
        return x @ weight.T
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # the CPU has no half-precision product with a wide result
        return x.float() @ weight.float().T


def _columns(targets: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's column (tokens, 1) in the block that starts there, and (tokens,) True where it lies inside."""
    column = targets - start
    return column.clamp(0, width - 1)[:, None], (column >= 0) & (column < width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
