"""Log-probs and entropies of response tokens, straight from hidden states: no (tokens, vocabulary) tensor is made.

The language model's head multiplies (tokens, hidden) by (vocabulary, hidden) to logits that are as wide as the
vocabulary: at 64 x 110 tokens, 49 152 words and float32 that is 1.4 GB, and autograd keeps several such tensors. Here
the head goes through the vocabulary in blocks and keeps, per token, a running log-sum-exp; the backward pass computes
each block again (as Cut Cross-Entropy does, Wijmans et al. 2025, arXiv:2411.09009).

Why blocks of the vocabulary and not of the tokens: each block then owns its rows of the weight's gradient. With blocks
of tokens every block adds to the whole of it, 113 MB here. Measured, forward and backward, 2048 tokens x 576 hidden x
49 152 vocabulary, bf16 autocast, one thread of an AMD EPYC (Zen 4, AVX512-BF16, 32 MiB cache, shared with other work),
CPU seconds, best of 3:

    torch.utils.checkpoint over blocks of 128, 256, 512 tokens    3.33, 4.08, 4.98
    autograd.Function over blocks of 128, 256, 512 tokens         3.78, 3.16, 3.27
    autograd.Function over blocks of 512, 2048, 8192 entries      2.61, 2.58, 2.66   (this file)
    the same with products in float32                             3.82
    the four bf16 matrix products alone                           2.18

With the entropy too 2.66, with a gradient through it 2.76.

Why the logits are shifted: a half-precision product sums in float32 but rounds its result, and bfloat16 numbers between
16 and 32 are 0.125 apart. Softmax does not change if a token's logits all move by the same amount, so its target's
logit is subtracted inside the sum, before the rounding: what matters to the log-prob then lies near zero, where
bfloat16 is fine. Difference to a float32 product of the same operands, SmolLM2-135M, 2422 tokens of GSM8K, targets
drawn from the model: mean 0.0009, largest 0.039; without the shift 0.020 and 0.19.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# 16 MiB of float32, so that a block stays in the cache from its product to its last use.
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

    The products take the autocast dtype, or without autocast the weight's; everything after them is float32.

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
        shift = (x.to(_wide(dtype)) * head_weight[targets].to(dtype)).sum(dim=1).to(dtype)
        target_logits = torch.zeros_like(shift, dtype=_wide(dtype))
        # Of the blocks so far: log-sum-exp, and the entropy of the softmax over them alone.
        lse = torch.full_like(target_logits, -torch.inf)
        entropies = torch.zeros_like(target_logits) if entropy else None
        for _, start, z in _logit_blocks(x, head_weight, shift, temperature, block):
            row, inside = _rows(targets, start, len(z))
            target_logits += torch.where(inside, z.gather(0, row).squeeze(0), 0.0)
            top = z.amax(dim=0)
            z.sub_(top)
            p = z.exp() if entropy else z.exp_()  # the block's softmax but for the factor 1 / total
            total = p.sum(dim=0)
            block_lse = top + total.log()
            lse, old_lse = torch.logaddexp(lse, block_lse), lse
            if entropies is not None:
                # Two parts with weights u + v = 1: H = u H_u + v H_v - u log u - v log v. All terms are positive, so
                # small entropies keep their digits, which log-sum-exp less the mean logit would not.
                block_entropies = total.log() - p.mul_(z).sum(dim=0) / total
                u, v = torch.exp(old_lse - lse), torch.exp(block_lse - lse)
                entropies = u * entropies + v * block_entropies + torch.special.entr(u) + torch.special.entr(v)
        # The weight is saved as it is, no copy in the autocast dtype: the parameter is in memory anyway.
        ctx.save_for_backward(x, head_weight, targets, shift, lse, entropies)
        ctx.temperature, ctx.block, ctx.hidden_dtype = temperature, block, hidden.dtype
        return target_logits - lse, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs, grad_entropies):
        x, head_weight, targets, shift, lse, entropies = ctx.saved_tensors
        grad_x = torch.zeros_like(x, dtype=lse.dtype)
        grad_weight = torch.empty_like(head_weight) if ctx.needs_input_grad[1] else None  # frozen under adapters
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)
        for weight, start, z in _logit_blocks(x, head_weight, shift, ctx.temperature, ctx.block):
            log_p = z.sub_(lse)
            if grad_entropies is None:
                grad_z = log_p.exp_().mul_(-grad_logprobs)
            else:
                slope = (log_p + entropies).mul_(-grad_entropies).sub_(grad_logprobs)
                grad_z = log_p.exp_().mul_(slope)
            row, inside = _rows(targets, start, len(z))
            grad_z.scatter_add_(0, row, torch.where(inside, grad_logprobs, 0.0)[None])
            if ctx.temperature != 1.0:
                grad_z.div_(ctx.temperature)
            grad_logits = grad_z.to(x.dtype)
            grad_x += grad_logits.T @ weight
            if grad_weight is not None:
                grad_weight[start : start + len(weight)] = grad_logits @ x
        return grad_x.to(ctx.hidden_dtype), grad_weight, None, None, None, None, None


def _logit_blocks(
    x: torch.Tensor, head_weight: torch.Tensor, shift: torch.Tensor, temperature: float, block: int
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Per block of the vocabulary: its weights in x's dtype, its first entry, its logits (entries, tokens), wide.

    The logits of each token are less their `shift`, which changes no probability. It rides along as the product's bias,
    inside the float32 sum that is then rounded: see the module's docstring.
    """
    for start in range(0, len(head_weight), block):
        weight = head_weight[start : start + block].to(x.dtype)
        z = F.linear(weight, x, -shift).to(_wide(x.dtype))
        yield weight, start, z if temperature == 1.0 else z.div_(temperature)


def _rows(targets: torch.Tensor, start: int, entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's row (1, tokens) in the block that starts there, and (tokens,) True where it lies inside."""
    row = targets - start
    return row.clamp(0, entries - 1)[None], (row >= 0) & (row < entries)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
