"""What a pass of the trainer works on, and the bytes that autograd keeps of it: formulas of the layers' operations.

Counted by hand from transformers' Llama and Qwen modules and from trainers/packing.py and logprobs.py; a test compares
with what autograd really saves. Korthikanti et al. 2022 (arXiv:2205.05198) count likewise for another architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainers.batching import TrainBatch
from trainers.logprobs import BLOCK_ELEMENTS
from trainers.model_sizes import ModelSizes
from trainers.packing import Layout, microbatches, pack

WIDE = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Shape:
    """Rows that attend in one call.

    Attributes:
        rows: of the block.
        width: tokens of a row, padding counted.
        prefix: tokens of the prompt that each row sees besides; 0 where rows are whole, and causal.
    """

    rows: int
    width: int
    prefix: int = 0

    @property
    def scores(self) -> int:
        """Query times key, of one head; both halves of a causal block."""
        return self.rows * self.width * (self.width + self.prefix)


@dataclass(frozen=True)
class Pass:
    """One forward pass, as one rank makes it.

    Attributes:
        tokens: that go through the layers.
        predicting: hidden states that go through the head: one a response token.
        blocks: of attention.
    """

    tokens: int
    predicting: int
    blocks: tuple[Shape, ...]

    @property
    def attended(self) -> int:
        """Query times key, of one head, that count: half of a causal block."""
        return sum(block.scores if block.prefix else block.scores // 2 for block in self.blocks)


@dataclass(frozen=True)
class Precision:
    """Bytes of an element.

    Attributes:
        weights: of the trainer's parameters (model.dtype).
        products: of the matrix products' operands (model.autocast).
        attention: of what attends; float32 on the CPU (trainers/packing.py).
    """

    weights: int
    products: int
    attention: int

    @classmethod
    def of(cls, dtype: str, autocast: str, on_cpu: bool) -> "Precision":
        """Of a config's model.dtype and model.autocast.

        >>> Precision.of("float32", "bf16", on_cpu=True)
        Precision(weights=4, products=2, attention=4)
        """
        weights = 2 if dtype == "bfloat16" else WIDE
        products = weights if autocast == "no" else 2
        return cls(weights, products, WIDE if on_cpu else products)

    @property
    def casts(self) -> bool:
        """True if autocast makes copies of inputs and weights."""
        return self.products != self.weights


def rank_batch(prompts: Sequence[int], n: int, response: int) -> TrainBatch:
    """A rank's batch of one step, of lengths alone: the trainer's own functions then say how it is cut and laid out.

    Args:
        prompts: tokens of each.
        n: responses a prompt,
        response: and the tokens of each.
    """
    lengths = torch.tensor(prompts).repeat_interleave(n)
    rows, longest = len(lengths), max(prompts) + response
    nothing = torch.zeros(1, 1).expand(rows, response)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return TrainBatch(
        input_ids=ids.expand(rows, longest),
        prompt_lengths=lengths,
        response_lengths=torch.full((rows,), response),
        response_ids=ids.expand(rows, response),
        response_mask=nothing == 0,
        engine_logprobs=nothing,
        scores=torch.zeros(rows),
        groups=torch.arange(len(prompts)).repeat_interleave(n),
    )


def passes(batch: TrainBatch, token_budget: int, packed: bool) -> list[Pass]:
    """How a batch is cut into passes of at most `token_budget` tokens."""
    parts = [batch.select(rows) for rows in microbatches(batch, token_budget, packed)]
    return [_of_layout(pack(part)) if packed else _of_rows(part) for part in parts]


def _of_layout(layout: Layout) -> Pass:
    shapes = []
    for block in layout.blocks:
        prefix = 0 if block.prefix is None else len(block.prefix) // block.rows
        shapes.append(Shape(block.rows, len(block.tokens) // block.rows, prefix))
    return Pass(layout.input_ids.shape[1], len(layout.predicting), tuple(shapes))


def _of_rows(part: TrainBatch) -> Pass:
    rows, width = part.input_ids.shape
    return Pass(rows * width, int(part.response_lengths.sum()), (Shape(rows, width),))


def layer_bytes(sizes: ModelSizes, step: Pass, precision: Precision) -> int:
    """Kept of one layer of one pass for its backward, the copies of its weights left out.

    T tokens, hidden size d, MLP size f, queries q and keys k wide; bytes w of weights, c of products, a of attention:

        two norms       2 T d (4 + w)       the float32 input, and what the norm's weight multiplies
        their outputs   5 T d c or 2 T d c  autocast casts one copy a product (q, k, v; gate, up); without it they share
        MLP             4 T f c             gate, its activation, up, and the product of both
        attention       T q c               the output projection's input
                        rows width 2 q a + rows (prefix + width) 2 k a, the padded queries, outputs, keys, values
                        rows width heads 4  log-sum-exps; with a prefix also the mask, rows width (prefix + width) a
        norms of heads  T (q + k) (4 + c)   Qwen 3 alone
    """
    d, q, k = sizes.hidden, sizes.query, sizes.key_value
    w, c, a = precision.weights, precision.products, precision.attention
    of_token = 2 * d * (WIDE + w) + (5 if precision.casts else 2) * d * c + 4 * sizes.intermediate * c + q * c
    if sizes.head_norms:
        of_token += (q + k) * (WIDE + c)
    attention = 0
    for block in step.blocks:
        attention += block.rows * block.width * (2 * q * a + sizes.heads * WIDE)
        attention += block.rows * (block.width + block.prefix) * 2 * k * a
        attention += block.scores * a if block.prefix else 0
    return step.tokens * of_token + attention


def kept_bytes(
    sizes: ModelSizes, step: Pass, precision: Precision, checkpointing: bool = False, head: bool = True
) -> int:
    """Kept of a pass when its forward has ended: all layers, the last norm, the head's input, copies of the weights.

    With gradient checkpointing a layer keeps its input alone, and one layer at a time is computed again.

    Args:
        head: False for a critic's own trunk, whose value head reads float32 hidden states.
    """
    w, c = precision.weights, precision.products
    layer = layer_bytes(sizes, step, precision)
    weights = sizes.matrices * c if precision.casts else 0
    if checkpointing:
        layers = sizes.layers * step.tokens * sizes.hidden * w + layer + weights // sizes.layers
    else:
        layers = sizes.layers * layer + weights
    of_head = step.predicting * sizes.hidden * (c if head else WIDE)
    positions = 2 * step.tokens * sizes.head_dim * w
    return layers + step.tokens * sizes.hidden * (WIDE + w) + of_head + positions


def head_block_bytes(sizes: ModelSizes, step: Pass, precision: Precision) -> int:
    """Of the logits held at once, in trainers/logprobs.py: a block in float32, twice, and once as the products'."""
    tokens = max(step.predicting, 1)
    entries = min(max(BLOCK_ELEMENTS // tokens, sizes.hidden), sizes.vocabulary)
    return entries * tokens * (2 * WIDE + precision.products)
