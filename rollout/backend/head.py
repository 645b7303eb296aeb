"""The output head's product, in float32 where asked for, from half-precision products.

bfloat16 logits of magnitude 16 to 32 are 0.125 apart, which alone puts the log-probs 0.02 off on average. vLLM runs the
head in float32 where `head_dtype` asks for it. On CUDA the bfloat16 product accumulates straight into float32; on the
CPU there is no such kernel, and the float32 product takes six times as long as the bfloat16 one. But the bfloat16
product accumulates in float32 too, and rounds at the very end: a second one, from which the rounded result of the
first is subtracted before its own rounding, gives what the first has lost.
"""

import torch

from rollout.sampling import Logits


def logits_of(hidden_states: torch.Tensor, weight: torch.Tensor, head_dtype: torch.dtype | None) -> Logits:
    """hidden_states @ weight.T for this rank's shard of the vocabulary.

    Args:
        hidden_states: (rows, hidden).
        weight: (shard, hidden), of the same dtype.
        head_dtype: float32 to keep what the rounding to a half-precision dtype loses; None or the weight's own dtype
        for
            the rounded logits alone.

    Returns:
        Logits of the weight's dtype, (rows, shard).
    """
    high = torch.mm(hidden_states, weight.t())
    if head_dtype != torch.float32 or weight.dtype == torch.float32:
        return Logits(high)
    return Logits(high, torch.addmm(high, hidden_states, weight.t(), beta=-1.0))
