"""Rows without padding, and each prompt once: the layout of a pass, and the attention that knows it.

Every layer but attention treats a token by itself. So the tokens of all rows stand one after another, without a pad
between them, and a prompt with several responses stands there once: its hidden states do not depend on them, and its
gradient is the sum of theirs, which is what autograd makes of it. (As in Prefix Grouper, arXiv:2506.05433.) A
response's last token is left out: it predicts nothing. Sixteen prompts of 46 tokens with 8 responses of 64 each are
8800 tokens this way, and 14 080 as padded rows.

Attention gathers queries, keys and values into blocks of sequences of like length: whole rows and prompts, causal;
responses, which see their prompt's keys and then their own.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainers.batching import TrainBatch, microbatch_rows

IMPLEMENTATION = "packed_rows"
"""Under this name transformers finds `packed_attention`."""
MASK_ELEMENTS = 2**26
"""Of one block's mask at most: 64 MiB."""


@dataclass(frozen=True)
class Block:
    """Sequences of like length that attend in one call.

    Attributes:
        tokens: (rows * width,) int64, where each row's tokens stand among the packed ones, right-padded with any.
        rows: of them.
        kept: (tokens of the block,) int64, which of `tokens` are no padding.
        prefix: (rows * prefix width,) int64, the same of the prompt that each row sees; None where rows are whole.
        mask: (rows, 1, width, prefix width + width) bool, True = is seen; None is causal.
    """

    tokens: torch.Tensor
    rows: int
    kept: torch.Tensor
    prefix: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """The tokens of some rows as one row of a model.

    Attributes:
        input_ids: (1, tokens) int64.
        position_ids: (1, tokens) int64, each token's place in its own row.
        predicting: (sampled tokens,) int64, the packed token whose hidden state predicts each of them; row after row,
            in the order of `TrainBatch.targets`.
        blocks: of attention; their kept tokens, one after another, are the packed ones in their order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predicting: torch.Tensor
    blocks: list[Block]


class NotPackable(Exception):
    """A model's attention is more than a causal softmax of scaled products."""


@dataclass
class _Sequence:
    """What stands together: a whole row, a shared prompt, or a response of one.

    Attributes:
        tokens: (length,) int64.
        first_position: of its first token in its row.
        prompt: that a response sees; None otherwise.
        start: where it stands among the packed tokens; known once all are sorted.
    """

    tokens: torch.Tensor
    first_position: int = 0
    prompt: "_Sequence | None" = None
    start: int = field(default=-1)

    def __len__(self) -> int:
        return len(self.tokens)

    def places(self) -> torch.Tensor:
        """(length,) int64 among the packed tokens."""
        return torch.arange(self.start, self.start + len(self))


def pack(batch: TrainBatch) -> Layout:
    """Lay out the rows of a micro-batch.

    Args:
        batch: rows whose `groups` are equal share their prompt.

    >>> batch = TrainBatch(
    ...     input_ids=torch.tensor([[5, 6, 8, 9], [5, 6, 7, 0]]), prompt_lengths=torch.tensor([2, 2]),
    ...     response_lengths=torch.tensor([2, 1]), response_ids=torch.tensor([[8, 9], [7, 0]]),
    ...     response_mask=torch.tensor([[True, True], [True, False]]), engine_logprobs=torch.zeros(2, 2),
    ...     scores=torch.zeros(2), groups=torch.tensor([0, 0]))
    >>> layout = pack(batch)
    >>> layout.input_ids, layout.position_ids  # the prompt; 8, which predicts 9
    (tensor([[5, 6, 8]]), tensor([[0, 1, 2]]))
    >>> layout.predicting  # 8 and 7 are predicted by the prompt's last token
    tensor([1, 2, 1])
    """
    rows, sequences = _sequences(batch)
    ordered = sorted(sequences, key=lambda sequence: (sequence.prompt is not None, len(sequence)))
    start = 0
    for sequence in ordered:
        sequence.start, start = start, start + len(sequence)
    predicting = []
    for of_row, prompt_length, mask in zip(rows, batch.prompt_lengths.tolist(), batch.response_mask.cpu(), strict=True):
        before = torch.cat([sequence.places() for sequence in of_row])
        predicting.append(before[prompt_length - 1 + mask.nonzero().squeeze(1)])
    device = batch.input_ids.device
    positions = [torch.arange(len(sequence)) + sequence.first_position for sequence in ordered]
    return Layout(
        input_ids=torch.cat([sequence.tokens for sequence in ordered])[None].to(device),
        position_ids=torch.cat(positions)[None].to(device),
        predicting=torch.cat(predicting).to(device),
        blocks=[_block(like, device) for like in _of_like_length(ordered)],
    )


def _sequences(batch: TrainBatch) -> tuple[list[list[_Sequence]], list[_Sequence]]:
    """Of each row its sequences in their order; and all of them, each once."""
    groups, input_ids = batch.groups.tolist(), batch.input_ids.cpu()
    sizes = Counter(groups)
    shared: dict[int, _Sequence] = {}
    rows = []
    for row, (group, prompt_length, length) in enumerate(
        zip(groups, batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)
    ):
        tokens = input_ids[row, : length - 1]
        if sizes[group] == 1:
            rows.append([_Sequence(tokens)])
            continue
        prompt = shared.setdefault(group, _Sequence(tokens[:prompt_length]))
        response = _Sequence(tokens[prompt_length:], prompt_length, prompt)
        rows.append([prompt, response] if len(response) else [prompt])
    return rows, list({id(sequence): sequence for of_row in rows for sequence in of_row}.values())


def _of_like_length(ordered: Sequence[_Sequence]) -> Iterator[list[_Sequence]]:
    """Cut where the kind changes, the length has doubled, or the block's mask would grow too large."""
    like: list[_Sequence] = []
    for sequence in ordered:
        if like and (
            (sequence.prompt is None) != (like[0].prompt is None)
            or len(sequence) > 2 * len(like[0])
            or _mask_elements([*like, sequence]) > MASK_ELEMENTS
        ):
            yield like
            like = []
        like.append(sequence)
    yield like


def _mask_elements(like: Sequence[_Sequence]) -> int:
    if like[0].prompt is None:
        return 0
    width = len(like[-1])
    return len(like) * width * (width + max(len(sequence.prompt) for sequence in like if sequence.prompt is not None))


def _block(like: Sequence[_Sequence], device: torch.device) -> Block:
    tokens, valid = _padded([sequence.places() for sequence in like])
    rows, width = tokens.shape
    kept = valid.flatten().nonzero().squeeze(1)
    if like[0].prompt is None:
        return Block(tokens.flatten().to(device), rows, kept.to(device))
    prompts = [sequence.prompt for sequence in like if sequence.prompt is not None]
    prefix, seen = _padded([prompt.places() for prompt in prompts])
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.cat([seen[:, None].expand(-1, width, -1), causal.expand(rows, -1, -1)], dim=2)[:, None]
    return Block(
        tokens.flatten().to(device), rows, kept.to(device), prefix.flatten().to(device), mask.contiguous().to(device)
    )


def _padded(places: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, longest) places, right-padded with 0; and (rows, longest) bool, True = no padding."""
    table = torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True)
    lengths = torch.tensor([len(of_row) for of_row in places])
    return table, torch.arange(table.shape[1]) < lengths[:, None]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows; what transformers calls in every layer.

    Args:
        query: (1, heads, tokens, head size); key and value with their own number of heads.
        layout: handed through the model's forward; None is torch's causal attention of plain rows.

    Returns:
        (1, tokens, heads, head size), and no weights.

    Raises:
        NotPackable: if the layer has a window, a soft cap or sinks.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    unknown = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if unknown or others.get("dropout"):
        raise NotPackable(f"{type(module).__name__} attends with {', '.join(unknown) or 'dropout'}")
    # (tokens, heads, size): rows of memory that index_select copies whole.
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    outputs = [_attend(block, q, k, v, scaling) for block in layout.blocks]
    return torch.cat(outputs)[None], None


def _attend(
    block: Block, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """(tokens of the block, heads, size)."""

    def rows(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return states.index_select(0, places).unflatten(0, (block.rows, -1)).transpose(1, 2)

    q, k, v = (rows(states, block.tokens) for states in (query, key, value))
    if block.prefix is not None:
        k = torch.cat([rows(key, block.prefix), k], dim=2)
        v = torch.cat([rows(value, block.prefix), v], dim=2)
    dtype, on_cpu = v.dtype, v.device.type == "cpu"
    if on_cpu:
        # torch 2.13's CPU kernel is twice as slow in half precision: 43 ms against 21, forward and backward, for 16
        # rows of 63 queries and 109 keys, 12 heads of 64, one core with AVX512-BF16.
        q, k, v = (states.to(torch.promote_types(states.dtype, torch.float32)) for states in (q, k, v))
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        output = F.scaled_dot_product_attention(
            q, k, v, block.mask, is_causal=block.mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        ).to(dtype)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, block.kept)


AttentionInterface.register(IMPLEMENTATION, packed_attention)


def packed_hidden_states(trunk: torch.nn.Module, layout: Layout) -> torch.Tensor:
    """(sampled tokens, hidden): the last hidden states that predict them, in the order of `targets`."""
    output = trunk(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, layout=layout)
    return output.last_hidden_state[0].index_select(0, layout.predicting)


def packs(model: PreTrainedModel) -> bool:
    """True if `pack_if_possible` has switched the model's attention."""
    return model.config._attn_implementation == IMPLEMENTATION


def response_hidden_states(model: PreTrainedModel, batch: TrainBatch) -> torch.Tensor:
    """(sampled tokens, hidden): the last hidden states that predict them, in the order of `TrainBatch.targets`.

    The trunk alone is called: a language model's own forward would make logits for every position.
    """
    if packs(model):
        return packed_hidden_states(model.base_model, pack(batch))
    return padded_hidden_states(model.base_model, batch)


def microbatches(batch: TrainBatch, token_budget: int, packed: bool) -> list[torch.Tensor]:
    """Rows cut into groups that fit a token budget.

    Args:
        token_budget: tokens of one pass: with `packed` as they stand in a layout, else with the padding.
        packed: True keeps the rows of a prompt together as far as the budget allows, the largest such groups first;
            False puts rows of like length together.

    Returns:
        Row numbers on the CPU, each row in one part. A row longer than the budget makes a part of its own.
    """
    if not packed:
        return microbatch_rows(batch.lengths, token_budget)
    of_group: dict[int, list[int]] = {}
    for row, group in enumerate(batch.groups.tolist()):
        of_group.setdefault(group, []).append(row)
    prompts, responses = batch.prompt_lengths.tolist(), batch.response_lengths.tolist()
    sizes = {group: prompts[rows[0]] + sum(responses[row] for row in rows) for group, rows in of_group.items()}
    parts: list[list[int]] = []
    room, last_group = 0, None
    for group in sorted(of_group, key=lambda group: -sizes[group]):
        for row in sorted(of_group[group], key=lambda row: -responses[row]):
            cost = responses[row] - 1 + (0 if group == last_group else prompts[row])
            if cost > room:
                parts.append([])
                room, cost = token_budget, responses[row] - 1 + prompts[row]
            parts[-1].append(row)
            room, last_group = room - cost, group
    return [torch.tensor(part) for part in parts]


@torch.no_grad()
def pack_if_possible(model: PreTrainedModel) -> bool:
    """Switch the model's attention to packed rows, if they give what plain rows do; returns whether they do.

    Three rows tell, two of which share a prompt, in the model's own precision. Windows, soft caps, sinks, a model that
    does not hand what it is given on to its attention, or one that mixes tokens elsewhere (a convolution, a
    recurrence): all of these stay with padded rows.
    """
    before = model.config._attn_implementation
    batch = _trial(model.config.get_text_config().vocab_size).to(model.device)
    plain = padded_hidden_states(model.base_model, batch)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        packed = packed_hidden_states(model.base_model, pack(batch))
        gap, scale = (packed - plain).abs().max().item(), plain.abs().max().item()
        tolerance = 1e-3 if plain.dtype in (torch.float32, torch.float64) else 3e-2
        if gap <= tolerance * scale:
            return True
    except (NotPackable, TypeError, ValueError):
        pass
    model.set_attn_implementation(before)
    return False


def _trial(vocab_size: int) -> TrainBatch:
    """Rows of 3 + 4, 3 + 2 and 2 + 5 tokens, the first two with the same prompt."""
    prompts, responses = torch.tensor([3, 3, 2]), torch.tensor([4, 2, 5])
    ids = torch.arange(1, 22).view(3, 7)
    ids[1, :3] = ids[0, :3]
    mask = torch.arange(5) < responses[:, None]
    return TrainBatch(
        input_ids=ids % vocab_size,
        prompt_lengths=prompts,
        response_lengths=responses,
        response_ids=torch.zeros(3, 5, dtype=torch.int64),
        response_mask=mask,
        engine_logprobs=torch.zeros(3, 5),
        scores=torch.zeros(3),
        groups=torch.tensor([0, 0, 1]),
    )


def padded_hidden_states(trunk: torch.nn.Module, batch: TrainBatch) -> torch.Tensor:
    """What `packed_hidden_states` gives, (response tokens, size), from right-padded rows.

    No attention mask is passed, and no position ids. Padding stands to the right and attention looks to the left, so no
    token that counts ever sees a pad (a test compares with rows run one by one); without a mask the attention kernels
    may take their causal fast path.
    """
    hidden = trunk(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.predicts_response.flatten().nonzero().squeeze(1))
