"""Padding heads changes nothing that can be seen: logits, gradients and the optimizer's step stay what they were."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trainers.head_padding import pad_attention_heads, padded_head_counts

# Small, so that every sum over the padded dimension is one block of the matrix library's (see head_padding.py).
HEAD_DIM = 16
SIZES = {
    "vocab_size": 97,
    "hidden_size": 9 * HEAD_DIM,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}


def random_model(family: str, dtype: torch.dtype = torch.float32):
    """A small random model whose biases, too, are not zero."""
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "_proj" in name:
                parameter.normal_(std=0.2)  # large enough that attention is far from uniform
    return model.to(dtype)


def tokens() -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("heads", "tensor_parallel_size", "expected"),
    [
        ((9, 3), 1, (9, 3)),
        ((9, 3), 2, (12, 4)),  # 3 -> 4 groups of 3
        ((9, 3), 4, (12, 4)),
        ((9, 3), 8, (24, 8)),
        ((9, 3), 3, (9, 3)),
        ((14, 2), 2, (14, 2)),
        ((14, 2), 4, (28, 4)),  # 2 key-value heads could be shared by 4 ranks, but 4 does not divide 14
        ((32, 8), 16, (32, 8)),  # 8 key-value heads, each given to 2 ranks
        ((5, 5), 2, (6, 6)),
    ],
)
def test_head_counts(heads, tensor_parallel_size, expected):
    assert padded_head_counts(*heads, tensor_parallel_size) == expected


@pytest.mark.parametrize("heads", [(9, 2), (0, 1), (4, 0)])
def test_impossible_head_counts_are_refused(heads):
    with pytest.raises(ValueError, match="multiple of the key-value heads"):
        padded_head_counts(*heads, 2)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor_parallel_size", [2, 8])
def test_logits_are_bit_identical(family, dtype, tensor_parallel_size):
    model = random_model(family, dtype)
    padded = pad_attention_heads(model, tensor_parallel_size)
    assert padded.config.num_attention_heads % tensor_parallel_size == 0
    with torch.no_grad():
        expected, actual = model(tokens()).logits, padded(tokens()).logits
    assert actual.dtype == dtype
    assert expected.std() > 0.1  # the model says something
    assert (actual - expected).abs().max().item() == 0.0


def test_logits_of_the_default_models_shape_are_bit_identical():
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, intermediate_size=160, **shape))
    with torch.no_grad():
        expected, actual = model(tokens()).logits, pad_attention_heads(model, 2)(tokens()).logits
    assert (actual - expected).abs().max().item() == 0.0


def test_real_heads_stand_first_and_keep_their_group():
    model = random_model("qwen2")
    attention = pad_attention_heads(model, 2).model.layers[1].self_attn
    original = model.model.layers[1].self_attn
    real, real_kv = 9 * HEAD_DIM, 3 * HEAD_DIM  # of 12 * 16 = 192 and 4 * 16 = 64
    assert attention.q_proj.weight.shape == (192, 144) and attention.v_proj.weight.shape == (64, 144)
    assert torch.equal(attention.q_proj.weight[:real], original.q_proj.weight)
    assert torch.equal(attention.k_proj.weight[:real_kv], original.k_proj.weight)
    assert torch.equal(attention.v_proj.bias[:real_kv], original.v_proj.bias)
    assert torch.equal(attention.o_proj.weight[:, :real], original.o_proj.weight)
    assert attention.num_key_value_groups == 3


def padding_of(model) -> dict[str, tuple[torch.nn.Parameter, tuple]]:
    """Every padded parameter of a 9/3 -> 12/4 model, with the index of what was added."""
    added = {}
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            added[name] = (parameter, (slice(9 * HEAD_DIM, None),))
        elif "k_proj" in name or "v_proj" in name:
            added[name] = (parameter, (slice(3 * HEAD_DIM, None),))
        elif "o_proj.weight" in name:
            added[name] = (parameter, (slice(None), slice(9 * HEAD_DIM, None)))
    return added


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_training_leaves_the_padding_at_zero_and_the_rest_alone(family):
    model = random_model(family)
    padded = pad_attention_heads(model, 2)
    added = padding_of(padded)
    assert len(added) == 2 * (4 if family == "llama" else 7)  # layers x (weights + biases of q, k and v)

    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.0) for each in (model, padded)]
    for _ in range(2):
        for each, optimizer in zip((model, padded), optimizers, strict=True):
            optimizer.zero_grad()
            each(tokens(), labels=tokens()).loss.backward()
            optimizer.step()
        for name, (parameter, index) in added.items():
            assert parameter.grad[index].numel() > 0, name
            assert parameter.grad[index].abs().max().item() == 0.0, name
            assert parameter[index].abs().max().item() == 0.0, name
        assert all(parameter.grad.abs().max() > 0 for parameter, _ in added.values())
    # After two steps of training the models still say the same, up to the order in which a gradient is summed.
    with torch.no_grad():
        torch.testing.assert_close(padded(tokens()).logits, model(tokens()).logits, rtol=0, atol=2e-3)


def test_a_model_that_fits_is_returned_as_it_is():
    model = random_model("llama")
    assert pad_attention_heads(model, 3) is model
    padded = pad_attention_heads(model, 2)
    assert pad_attention_heads(padded, 2) is padded


def test_the_original_is_untouched():
    model = random_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    padded = pad_attention_heads(model.train(), 2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert padded.training and padded.lm_head.weight is padded.model.embed_tokens.weight
    assert model.config.num_attention_heads == 9
    with torch.no_grad():
        for parameter in padded.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_saved_and_loaded_again(tmp_path):
    model = random_model("qwen2")
    pad_attention_heads(model, 2).save_pretrained(tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads, loaded.config.head_dim) == (12, 4, 16)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_model_without_the_projections_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=96, n_layer=1, n_head=3))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has 0 attention layers with linear q_proj"):
        pad_attention_heads(model, 2)


def test_a_model_with_other_parameters_sized_by_heads_is_refused():
    # OLMo 2 normalises the whole q projection: its norm has one weight a row.
    model = Olmo2ForCausalLM(Olmo2Config(**SIZES))
    with pytest.raises(ValueError, match="q_norm"):
        pad_attention_heads(model, 2)


def test_a_model_whose_projections_are_not_its_heads_is_refused():
    model = random_model("llama")
    model.config.head_dim = 8
    with pytest.raises(ValueError, match=r"sizes \(144, 48, 48, 144\), which are not 9 query"):  # 9 x 16 and 3 x 16
        pad_attention_heads(model, 2)
