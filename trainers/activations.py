"""What a pass of the trainer works on, and the bytes that autograd keeps of it: formulas of the layers' operations.

Counted by hand from transformers' Llama and Qwen modules and from trainers/packing.py and logprobs.py; a test compares
with what autograd really saves. Korthikanti et al. 2022 (arXiv:2205.05198) count likewise for another architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from trainers.batching import TrainBatch
from trainers.logprobs import BLOCK_ELEMENTS
from trainers.model_sizes import Adapters, ModelSizes
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
        adapters: of the operands of LoRA adapters, whose weights are float32 whatever the model is.
        sharded: True if weights come in their products' dtype, and go after each layer (FSDP2).
    """

    weights: int
    products: int
    attention: int
    adapters: int = WIDE
    sharded: bool = False

    @classmethod
    def of(cls, dtype: str, autocast: str, on_cpu: bool, sharded: bool = False) -> "Precision":
        """Of a config's model.dtype and model.autocast.

        >>> Precision.of("float32", "bf16", on_cpu=True)
        Precision(weights=4, products=2, attention=4, adapters=2, sharded=False)
        """
        weights = 2 if dtype == "bfloat16" else WIDE
        products = weights if autocast == "no" else 2
        return cls(weights, products, WIDE if on_cpu else products, WIDE if autocast == "no" else 2, sharded)

    @property
    def casts(self) -> bool:
        """True if autocast makes copies of the products' inputs."""
        return self.products != self.weights

    @property
    def copies_weights(self) -> bool:
        """True if it makes copies of the weights, too."""
        return self.casts and not self.sharded

    @property
    def adapters_share(self) -> bool:
        """True if adapters read the very input of their matrix, and not each a copy of its own."""
        return self.adapters == self.weights and (self.weights == WIDE or self.sharded)


def rank_batch(prompts: Sequence[int], n: int, response: int, observed: int = 0) -> TrainBatch:
    """A rank's batch of one step, of lengths alone: the trainer's own functions then say how it is cut and laid out.

    Args:
        prompts: tokens of each.
        n: responses a prompt,
        response: the tokens of each that the policy samples,
        observed: and those that an environment adds.
    """
    groups = torch.arange(len(prompts)).repeat_interleave(n)
    return _of_lengths(torch.tensor(prompts)[groups], groups, response, observed)


def _of_lengths(prompts: torch.Tensor, groups: torch.Tensor, response: int, observed: int) -> TrainBatch:
    """Of rows with these prompts' lengths; the tensors that are wide hold one element."""
    rows, longest = len(prompts), int(prompts.max()) + observed + response
    sampled = torch.arange(observed + response) >= observed
    nothing = torch.zeros(1, 1).expand(rows, len(sampled))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return TrainBatch(
        input_ids=ids.expand(rows, longest),
        prompt_lengths=prompts,
        response_lengths=torch.full((rows,), len(sampled)),
        response_ids=ids.expand(rows, len(sampled)),
        response_mask=sampled.expand(rows, len(sampled)),
        engine_logprobs=nothing,
        scores=torch.zeros(rows),
        groups=groups,
    )


def passes(batch: TrainBatch, token_budget: int, packed: bool) -> list[Pass]:
    """How a batch is cut into passes of at most `token_budget` tokens."""
    parts = [batch.select(rows) for rows in microbatches(batch, token_budget, packed)]
    return [_of_packed(part) if packed else _of_rows(part) for part in parts]


def _of_packed(part: TrainBatch) -> Pass:
    """Laid out once of all parts that are alike: long rows' masks take a while to make."""
    numbers: dict[int, int] = {}
    groups = tuple(numbers.setdefault(group, len(numbers)) for group in part.groups.tolist())
    sampled = int(part.response_mask[0].sum())
    observed = int(part.response_lengths[0]) - sampled
    return _laid_out(tuple(part.prompt_lengths.tolist()), groups, sampled, observed)


@lru_cache(maxsize=1024)
def _laid_out(prompts: tuple[int, ...], groups: tuple[int, ...], response: int, observed: int) -> Pass:
    return _of_layout(pack(_of_lengths(torch.tensor(prompts), torch.tensor(groups), response, observed)))


def _of_layout(layout: Layout) -> Pass:
    shapes = []
    for block in layout.blocks:
        prefix = 0 if block.prefix is None else len(block.prefix) // block.rows
        shapes.append(Shape(block.rows, len(block.tokens) // block.rows, prefix))
    return Pass(layout.input_ids.shape[1], len(layout.predicting), tuple(shapes))


def _of_rows(part: TrainBatch) -> Pass:
    rows, width = part.input_ids.shape
    return Pass(rows * width, int(part.response_mask.sum()), (Shape(rows, width),))


def layer_bytes(sizes: ModelSizes, step: Pass, precision: Precision, adapters: Adapters | None = None) -> int:
    """Kept of one layer of one pass for its backward, the copies of its weights left out.

    T tokens, hidden size d, MLP size f, queries q and keys k wide; bytes w of weights, c of products, a of attention:

        two norms       2 T d (4 + w)       the float32 input, and what the norm's weight multiplies
        their outputs   5 T d c or 2 T d c  autocast casts one copy a product (q, k, v; gate, up); without it they share
        MLP             4 T f c             gate, its activation, up, and the product of both
        attention       T q c               the output projection's input
                        rows width 2 q a + rows (prefix + width) 2 k a, the padded queries, outputs, keys, values
                        rows width heads 4  log-sum-exps; with a prefix also the mask, rows width (prefix + width) a
        norms of heads  T (q + k) (4 + c)   Qwen 3 alone

    Under LoRA nothing is kept for the gradients of frozen weights (of the norms their input alone, of the products
    nothing), but each adapter's input, a copy of its own unless all is float32, and what A makes of it (T rank).
    """
    d, q, k, f = sizes.hidden, sizes.query, sizes.key_value, sizes.intermediate
    w, c, a = precision.weights, precision.products, precision.attention
    if adapters is None:
        of_token = 2 * d * (WIDE + w) + (5 if precision.casts else 2) * d * c + 4 * f * c + q * c
        of_token += (q + k) * (WIDE + c) if sizes.head_norms else 0
    else:
        # Without copies queries, keys and values read one input, and so do gate and up: here all five have adapters.
        shared = 3 * d if precision.adapters_share else 0
        inputs = adapters.inputs // sizes.layers - shared + adapters.layers // sizes.layers * adapters.rank
        of_token = 2 * d * WIDE + 3 * f * c + inputs * precision.adapters
        of_token += (q + k) * WIDE if sizes.head_norms else 0
    attention = 0
    for block in step.blocks:
        attention += block.rows * block.width * (2 * q * a + sizes.heads * WIDE)
        attention += block.rows * (block.width + block.prefix) * 2 * k * a
        attention += block.scores * a if block.prefix else 0
    return step.tokens * of_token + attention


def kept_bytes(
    sizes: ModelSizes,
    step: Pass,
    precision: Precision,
    checkpointing: bool = False,
    head: bool = True,
    adapters: Adapters | None = None,
) -> int:
    """Kept of a pass when its forward has ended: all layers, the last norm, the head's input, copies of the weights.

    With gradient checkpointing a layer keeps its input alone.

    Args:
        head: False for a critic's own trunk, whose value head reads float32 hidden states.
        adapters: trained in place of the model's own parameters.
    """
    w, c = precision.weights, precision.products
    weights = sizes.matrices * c if precision.copies_weights else 0
    if checkpointing:
        layers = sizes.layers * step.tokens * sizes.hidden * w
    else:
        layers = sizes.layers * layer_bytes(sizes, step, precision, adapters) + weights
    of_head = step.predicting * sizes.hidden * (c if head else WIDE)
    positions = 2 * step.tokens * sizes.head_dim * w
    last_norm = step.tokens * sizes.hidden * (WIDE + (w if adapters is None else 0))
    return layers + last_norm + of_head + positions


def head_block_bytes(sizes: ModelSizes, step: Pass, precision: Precision) -> tuple[int, int]:
    """Of the logits held at once in trainers/logprobs.py, forward and backward.

    A block in float32, and as its product made it, while the last block is still there: forward its logits and their
    exponentials, backward its gradient in float32 and as the product's operand; and the block's weights, where cast.
    """
    tokens, narrow = max(step.predicting, 1), precision.products if precision.products < WIDE else 0
    entries = min(max(BLOCK_ELEMENTS // tokens, sizes.hidden), sizes.vocabulary)
    weights = entries * sizes.hidden * precision.products if precision.casts else 0
    if entries == sizes.vocabulary:
        return entries * tokens * 2 * WIDE + weights, entries * tokens * (WIDE + narrow) + weights
    return entries * tokens * (3 * WIDE + narrow) + weights, entries * tokens * 2 * (WIDE + narrow) + weights
