"""The policy against the language model's own logits, in double precision where the architecture allows it."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from trainers.batching import TrainBatch
from trainers.policy import Policy, load_policy, load_reference, require_plain_head

SMALL = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
PROMPTS, RESPONSES = [3, 1, 3], [4, 5, 2]  # lengths; the longest row has 7 tokens
CLOSE = dict(rtol=5e-6, atol=1e-6)  # Llama's norm and rotary embedding compute in float32, whatever the weights are


def tiny_llama(**changed) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**(SMALL | dict(num_key_value_heads=2, tie_word_embeddings=True) | changed))
    # Transformers draws weights of 0.02: logits too flat to tell a right answer from a wrong one.
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(pad: int = 0) -> TrainBatch:
    """Three rows of up to 7 tokens with 11 response tokens; the first and the last have the same prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((3, 7), pad)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids[row, : prompt + response] = torch.randint(1, 37, (prompt + response,), generator=generator)
    ids[2, :3] = ids[0, :3]
    return batch_of(ids, PROMPTS, RESPONSES, groups=[0, 1, 0])


def batch_of(ids: torch.Tensor, prompts: list[int], responses: list[int], groups: list[int]) -> TrainBatch:
    lengths = torch.tensor(responses)
    mask = torch.arange(max(responses)) < lengths[:, None]
    response_ids = torch.zeros(mask.shape, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        response_ids[row, :response] = ids[row, prompt : prompt + response]
    return TrainBatch(
        input_ids=ids,
        prompt_lengths=torch.tensor(prompts),
        response_lengths=lengths,
        response_ids=response_ids,
        response_mask=mask,
        engine_logprobs=torch.zeros(mask.shape),
        scores=torch.zeros(len(ids)),
        groups=torch.tensor(groups),
    )


def padded(policy: Policy) -> Policy:
    """The same, its passes over padded rows."""
    policy.language_model.set_attn_implementation("sdpa")
    assert not policy.packs
    return policy


def naive(policy: Policy, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and values of each row alone, unpadded, from the language model's full logits."""
    ids = inputs().input_ids
    logprobs, entropies, values = [], [], []
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens = ids[row : row + 1, : prompt + response]
        output = policy.language_model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        log_p = torch.log_softmax(output.logits[0] / temperature, dim=-1)
        for t in range(response):
            logprobs.append(log_p[prompt - 1 + t, tokens[0, prompt + t]])
            entropies.append(-(log_p[prompt - 1 + t].exp() * log_p[prompt - 1 + t]).sum())
            state = output.hidden_states[-1][0, prompt - 1 + t]
            values.append(state.double() @ policy.value_head.weight[0].double() + policy.value_head.bias[0].double())
    return torch.stack(logprobs), torch.stack(entropies), torch.stack(values)


def double_policy(**changed) -> Policy:
    policy = Policy(tiny_llama(**changed).double(), with_values=True)
    torch.nn.init.normal_(policy.value_head.weight)
    torch.nn.init.normal_(policy.value_head.bias)
    return policy


@pytest.mark.parametrize("as_they_come", [lambda policy: policy, padded], ids=["packed", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_batch_gives_what_the_rows_give_one_by_one(temperature: float, as_they_come):
    policy = as_they_come(double_policy())
    output = policy(inputs(), temperature=temperature, entropy=True)
    for ours, expected in zip(output, naive(policy, temperature), strict=True):
        torch.testing.assert_close(ours, expected, **CLOSE)


def test_a_pass_without_log_probs_gives_the_same_values():
    policy = double_policy()
    assert policy(inputs(), logprobs=False).logprobs is None
    assert torch.equal(policy(inputs(), logprobs=False).values, policy(inputs()).values)


def test_a_critic_of_its_own_leaves_the_policy_alone():
    critic = tiny_llama(hidden_size=24).double()
    policy = Policy(tiny_llama().double(), with_values=True, critic=critic.model)
    torch.nn.init.normal_(policy.value_head.weight)
    output = policy(inputs())
    batch = inputs()
    hidden = critic(batch.input_ids, output_hidden_states=True).hidden_states[-1]
    expected = policy.value_head(hidden)[..., 0][batch.predicts_response]
    torch.testing.assert_close(output.values, expected, **CLOSE)
    output.values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.language_model.parameters())
    assert all(parameter.grad is not None for parameter in policy.critic_parameters() if parameter is not
               critic.model.embed_tokens.weight)  # fmt: skip


def test_no_token_sees_the_padding():
    policy = padded(double_policy())
    for clean, other in zip(policy(inputs(pad=0)), policy(inputs(pad=36)), strict=True):
        assert (clean is None and other is None) or torch.equal(clean, other)


@pytest.mark.parametrize("as_they_come", [lambda policy: policy, padded], ids=["packed", "padded"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_all_parameters_are_those_through_the_full_logits(tied: bool, as_they_come):
    """A tied embedding collects its gradient as an embedding and as a head; and DDP needs every parameter used."""
    policy = as_they_come(double_policy(tie_word_embeddings=tied))
    parameters = dict(policy.named_parameters())
    assert ("language_model.lm_head.weight" in parameters) != tied

    def gradients(outputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        weights = torch.linspace(-1, 1, 11, dtype=torch.float64)
        loss = sum((weights * output).sum() * factor for output, factor in zip(outputs, (1.0, 0.5, 2.0), strict=True))
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    ours, expected = gradients(policy(inputs(), entropy=True)), gradients(naive(policy, 1.0))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.any(), name


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path)
    gradients = []
    for gradient_checkpointing in (False, True):
        policy = load_policy(str(tmp_path), "float32", gradient_checkpointing)
        assert policy.language_model.is_gradient_checkpointing == gradient_checkpointing
        policy(inputs()).logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in policy.language_model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)


def test_outputs_that_nobody_asked_for_are_none():
    output = double_policy()(inputs(), values=False)
    assert output.values is None and output.entropy is None and output.logprobs.shape == (11,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_value_head_starts_at_zero_in_float32(tmp_path: Path, dtype: str):
    tiny_llama().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), dtype, with_values=True)
    output = policy(inputs())
    assert output.values.tolist() == [0.0] * 11 and output.values.dtype == output.logprobs.dtype == torch.float32
    assert policy.language_model.lm_head.weight.dtype == getattr(torch, dtype)
    assert policy.value_head.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.nn.init.ones_(policy.value_head.weight)
        assert policy(inputs()).values.dtype == torch.float32  # autocast would have rounded the sum to bfloat16


def test_the_engine_finds_the_language_models_own_names():
    model = tiny_llama()
    names = {name for name, _ in model.named_parameters()}
    policy = Policy(model, with_values=True)
    assert {name for name, _ in policy.language_model.named_parameters()} == names
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names  # tied: sent once


def saved(model: PreTrainedModel, path: Path) -> str:
    model.save_pretrained(path)
    return str(path)


def gpt2_with_dropout() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0.1
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [lambda: tiny_llama(attention_dropout=0.5), gpt2_with_dropout])
def test_training_mode_gives_the_log_probs_of_evaluation_mode(tmp_path: Path, make):
    policy = load_policy(saved(make(), tmp_path), "float32")
    assert policy.training and policy.language_model.training
    training = policy(inputs()).logprobs
    assert torch.equal(training, policy.eval()(inputs()).logprobs)


def test_the_reference_is_frozen_and_agrees_with_the_policy_it_came_from(tmp_path: Path):
    path = saved(tiny_llama(), tmp_path)
    reference = load_reference(path, "float32")
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    expected = load_policy(path, "float32")(inputs(), temperature=0.6).logprobs
    assert torch.equal(reference(inputs(), temperature=0.6).logprobs, expected)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that an operation under it returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_prompt_positions_get_no_logits():
    """4 rows of 200 tokens of which 5 are a response, 5000 words: 20 x 5000 logits, not 800 x 5000."""
    policy = Policy(tiny_llama(vocab_size=5000), with_values=True)
    ids = torch.ones(4, 200, dtype=torch.int64)
    with LargestTensor() as largest:
        policy(batch_of(ids, [195] * 4, [5] * 4, groups=[0, 1, 2, 3])).logprobs.sum().backward()
    assert largest.elements < 4 * 4 * 200 * 200 + 1  # the attention's own (batch, heads, sequence, sequence)


def heads_that_are_more_than_a_matrix():
    torch.manual_seed(0)
    one_head = dict(num_key_value_heads=4, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    phi = PhiForCausalLM(PhiConfig(**SMALL, **one_head))
    torch.nn.init.normal_(phi.lm_head.bias)
    yield pytest.param(phi, id="bias")
    yield pytest.param(GraniteForCausalLM(GraniteConfig(**SMALL, **one_head, logits_scaling=8.0)), id="scaling")
    yield pytest.param(CohereForCausalLM(CohereConfig(**SMALL, **one_head, logit_scale=0.0625)), id="scale")
    gemma = Gemma2ForCausalLM(Gemma2Config(**SMALL, **one_head, head_dim=4, final_logit_softcapping=0.1))
    yield pytest.param(gemma, id="soft cap")


@pytest.mark.parametrize("model", list(heads_that_are_more_than_a_matrix()))
def test_a_head_that_is_more_than_a_matrix_is_refused(model: PreTrainedModel):
    with pytest.raises(ValueError, match="its head has a bias, a scale or a soft cap"):
        require_plain_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_is_accepted(dtype: torch.dtype):
    require_plain_head(tiny_llama().to(dtype))
