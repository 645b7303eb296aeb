"""The output head in float32 on the CPU, without casting its weight in every step.

bfloat16 logits of magnitude 16 to 32 are 0.125 apart, which alone puts the log-probs 0.02 off on average. vLLM runs the
head in float32 where `head_dtype` asks for it; on CUDA the bf16 product accumulates straight into float32, but on the
CPU the whole weight is cast anew in every step (90 ms for half of 49 152 x 576). Here the cast copy is kept, and
refreshed by every weight sync.
"""

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.logits_processor import LogitsProcessor


class Float32Head:
    """Takes the place of a CPU LogitsProcessor's product; made after each load of the weights.

    Args:
        processor: of the model.
        lm_head: the module that holds the head's weight, this rank's shard of the vocabulary.
    """

    def __init__(self, processor: LogitsProcessor, lm_head: torch.nn.Module) -> None:
        self._lm_head = lm_head
        self._weight = _weight_of(lm_head).float()
        processor._apply_head = self._apply

    def refresh(self) -> None:
        """Take the weight over again, after a sync."""
        self._weight.copy_(_weight_of(self._lm_head))

    def _apply(
        self, lm_head: torch.nn.Module, hidden_states: torch.Tensor, embedding_bias: torch.Tensor | None
    ) -> torch.Tensor:
        assert lm_head is self._lm_head
        bias = None if embedding_bias is None else embedding_bias.float()
        return F.linear(hidden_states.float(), self._weight, bias)


def keep_float32_head(model: torch.nn.Module) -> Float32Head | None:
    """A Float32Head for the model, or None where its head is not float32 or not where most models have it."""
    processor, lm_head = getattr(model, "logits_processor", None), getattr(model, "lm_head", None)
    if not isinstance(processor, LogitsProcessor) or lm_head is None:
        return None
    weight = _weight_of(lm_head)
    if processor.head_dtype != torch.float32 or weight.dtype == torch.float32 or weight.is_cuda:
        return None
    return Float32Head(processor, lm_head)


def _weight_of(lm_head: torch.nn.Module) -> torch.Tensor:
    weight = lm_head.weight
    assert isinstance(weight, torch.Tensor)
    return weight
