"""Packed rows against padded ones: the same hidden states and gradients, the budget kept, odd models left alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import trainers.packing as packing
from trainers.batching import TrainBatch
from trainers.packing import microbatches, pack, pack_if_possible, packs, padded_hidden_states, response_hidden_states

SMALL = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
GROUPED = SMALL | dict(num_key_value_heads=2, head_dim=8, initializer_range=0.5)


def batch_of(rows: list[tuple[int, int]]) -> TrainBatch:
    """Random rows, of each its prompt's number and its response's length; prompt p has p % 4 + 1 tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = {p: torch.randint(1, 37, (p % 4 + 1,), generator=generator) for p in sorted({p for p, _ in rows})}
    responses = [torch.randint(1, 37, (length,), generator=generator) for _, length in rows]
    whole = [torch.cat([prompts[p], response]) for (p, _), response in zip(rows, responses, strict=True)]
    lengths = torch.tensor([length for _, length in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return TrainBatch(
        input_ids=torch.nn.utils.rnn.pad_sequence(whole, batch_first=True),
        prompt_lengths=torch.tensor([len(prompts[p]) for p, _ in rows]),
        response_lengths=lengths,
        response_ids=torch.nn.utils.rnn.pad_sequence(responses, batch_first=True),
        response_mask=mask,
        engine_logprobs=torch.zeros(mask.shape),
        scores=torch.zeros(len(rows)),
        groups=torch.tensor([p for p, _ in rows]),
    )


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GROUPED)).double()
    assert pack_if_possible(model)
    return model


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(rows=ROWS, small_masks=st.booleans(), turns=st.booleans())
def test_packed_rows_have_the_hidden_states_of_padded_ones(llama, rows, small_masks: bool, turns: bool):
    batch = batch_of(rows)
    if turns:  # all but each row's last token may be an environment's
        columns = torch.arange(batch.response_mask.shape[1])
        last = columns == batch.response_lengths[:, None] - 1
        given = torch.rand(last.shape, generator=torch.Generator().manual_seed(len(rows))) < 0.4
        batch = replace(batch, response_mask=batch.response_mask & (last | ~given))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MASK_ELEMENTS", 40 if small_masks else 2**26)
        packed = response_hidden_states(llama, batch)
    llama.set_attn_implementation("sdpa")
    padded = padded_hidden_states(llama.base_model, batch)
    llama.set_attn_implementation(packing.IMPLEMENTATION)
    assert len(packed) == batch.response_mask.sum()
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def test_a_prompt_stands_there_once_and_last_tokens_not_at_all():
    batch = batch_of([(3, 5), (3, 2), (1, 4), (3, 1)])
    # Prompt 3, of 4 tokens, with 4 + 1 + 0 response tokens; prompt 1, of 2, with 3.
    assert pack(batch).input_ids.shape == (1, 4 + 4 + 1 + 0 + 2 + 3)
    assert batch.lengths.sum() == 26


def test_the_mask_of_a_block_is_bounded(monkeypatch):
    batch = batch_of([(3, 9)] * 8)
    (_, block) = pack(batch).blocks
    assert block.rows == 8
    monkeypatch.setattr(packing, "MASK_ELEMENTS", 3 * 8 * (8 + 4))
    assert [block.rows for block in pack(batch).blocks[1:]] == [3, 3, 2]


def test_lengths_that_differ_more_than_twofold_attend_apart():
    blocks = pack(batch_of([(3, 2), (3, 3), (3, 4), (3, 9)])).blocks
    assert [block.rows for block in blocks] == [1, 2, 1, 1]  # the prompt; 1 and 2 tokens; 3; 8


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, budget=st.integers(1, 60))
def test_micro_batches_keep_the_budget_and_every_row(rows, budget: int):
    batch = batch_of(rows)
    parts = microbatches(batch, budget, packed=True)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(rows)))
    for part in parts:
        assert pack(batch.select(part)).input_ids.shape[1] <= budget or len(part) == 1


def test_responses_to_a_prompt_stay_together_where_the_budget_allows():
    batch = batch_of([(3, 5), (1, 5), (3, 5), (1, 5)])
    # Prompt 3's rows are 4 + 4 + 4 tokens, prompt 1's 2 + 4 + 4.
    assert [part.tolist() for part in microbatches(batch, 12, packed=True)] == [[0, 2], [1, 3]]
    assert [part.tolist() for part in microbatches(batch, 18, packed=True)] == [[0, 2, 1], [3]]


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
OWN_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # the defaults are beyond 37 words
MODELS: dict[str, tuple[bool, Callable]] = {
    "llama": (True, lambda: LlamaForCausalLM(LlamaConfig(**GROUPED))),
    "qwen2": (True, lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED))),
    "qwen3": (True, lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED))),
    "a window": (False, lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=64))),
    "a soft cap": (False, lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, attn_logit_softcapping=5.0))),
    "qwen3 with experts": (True, lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**GROUPED, **EXPERTS))),
    "gemma": (True, lambda: GemmaForCausalLM(GemmaConfig(**GROUPED))),
    "mistral": (True, lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None))),
    "phi3": (True, lambda: Phi3ForCausalLM(Phi3Config(**GROUPED, **OWN_TOKENS))),
    "olmo2": (True, lambda: Olmo2ForCausalLM(Olmo2Config(**GROUPED, **OWN_TOKENS))),
    "smollm3": (True, lambda: SmolLM3ForCausalLM(SmolLM3Config(**GROUPED, **OWN_TOKENS))),
    "learned positions": (True, lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=16, vocab_size=37))),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_models_pack(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    expected, make = MODELS[name]
    model = make().to(dtype).eval()
    batch = batch_of([(3, 5), (3, 2), (1, 4)])
    padded = padded_hidden_states(model.base_model, batch)
    assert pack_if_possible(model) == packs(model) == expected
    assert expected or model.config._attn_implementation == "sdpa"
    found = response_hidden_states(model, batch)
    assert found.shape == padded.shape == (11, 16)
    if dtype == torch.float32:
        torch.testing.assert_close(found, padded, rtol=1e-4, atol=1e-4)


def test_a_model_that_packs_still_takes_plain_rows(llama):
    ids = torch.arange(1, 15).view(2, 7)
    packed_off = LlamaForCausalLM(llama.config).double()
    packed_off.load_state_dict(llama.state_dict())
    packed_off.set_attn_implementation("sdpa")
    torch.testing.assert_close(llama(ids).logits, packed_off(ids).logits, rtol=1e-6, atol=1e-6)
