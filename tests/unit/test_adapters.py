"""Adapters merged on the way against PEFT's own merge, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rollout.adapters import LoraWeight, Weight, check_adapters, has_adapters
from rollout.weights import named_weights

SMALL = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
Q = "model.layers.0.self_attn.q_proj"


def llama(tied: bool = True, dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SMALL | {"tie_word_embeddings": tied} | config))).to(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    """With adapters that are not zero."""
    policy = get_peft_model(model, LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | config)))
    return trained(policy)


def trained(policy: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def merged(weight: Weight) -> torch.Tensor:
    return weight.merged() if isinstance(weight, LoraWeight) else weight


def sent(policy: nn.Module) -> dict[str, torch.Tensor]:
    return {name: merged(weight) for name, weight in named_weights(policy)}


def by_peft(policy: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach() for name, each in copy.deepcopy(policy).merge_and_unload().named_parameters()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


CASES = {
    "all linear layers": (llama, {}),
    "an untied head": (lambda: llama(tied=False), {"target_modules": ["q_proj", "lm_head"]}),
    "an untied embedding": (lambda: llama(tied=False), {"target_modules": ["embed_tokens", "up_proj"]}),
    "ranks and alphas by layer": (llama, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}}),
    "rank-stabilised": (llama, {"use_rslora": True}),
    "biases of the base": (lambda: llama(attention_bias=True), {"bias": "lora_only"}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "PiSSA": (llama, {"init_lora_weights": "pissa"}),
    "an embedding trained whole": (lambda: llama(tied=False), {"modules_to_save": ["embed_tokens", "lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_merge_is_pefts_own_to_the_last_bit(case: str) -> None:
    make, config = CASES[case]
    policy = adapted(make(), **config)
    before = {name: each.clone() for name, each in policy.named_parameters()}
    assert_equal(sent(policy), by_peft(policy))
    assert sent(policy).keys() == dict(make().named_parameters()).keys()
    assert_equal(dict(policy.named_parameters()), before)  # nothing was merged in place


TIED = {
    "a tied embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "ensure_weight_tying": True},
    "both trained whole": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("case", [*CASES, *TIED])
def test_the_merged_model_computes_what_the_policy_computes(case: str) -> None:
    """(PEFT's own merge adds a tied adapter twice, once under each name.)"""
    make, config = CASES[case] if case in CASES else (llama, TIED[case])
    policy, ids = adapted(make(), **config).eval(), torch.arange(12)[None]
    plain = make().eval()
    assert torch.nn.Module.load_state_dict(plain, sent(policy), strict=False).unexpected_keys == []
    with torch.no_grad():
        ours, theirs = policy(input_ids=ids).logits, plain(input_ids=ids).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, make().eval()(input_ids=ids).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_rounded_once(dtype: torch.dtype) -> None:
    policy = adapted(llama(dtype=dtype))
    theirs = by_peft(policy)
    for name, weight in named_weights(policy):
        assert torch.equal(merged(weight).to(dtype), theirs[name]), name
        if isinstance(weight, LoraWeight):
            (adapter,) = weight.adapters
            exact = weight.base.double() + adapter.scaling * adapter.b.double() @ adapter.a.double()
            torch.testing.assert_close(merged(weight).double(), exact, rtol=1e-6, atol=1e-6)


def test_several_adapters_add_up() -> None:
    policy = adapted(llama())
    policy.add_adapter("other", LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", "o_proj"]))
    assert_equal(sent(policy), by_peft(policy))  # of the active one alone
    alone = sent(policy)
    policy.base_model.set_adapter(["default", "other"])
    trained(policy)
    assert_equal(sent(policy), by_peft(policy))
    assert not torch.equal(sent(policy)[f"{Q}.weight"], alone[f"{Q}.weight"])


def test_what_is_switched_off_or_merged_already_adds_nothing() -> None:
    policy = adapted(llama(), modules_to_save=["norm"])
    base, full = dict(llama().named_parameters()), sent(policy)
    with policy.disable_adapter():
        assert_equal(sent(policy), base)
    assert_equal(sent(policy), full)
    policy.merge_adapter()
    assert_equal(sent(policy), full)
    policy.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="switched off and merged at once.*unmerge_adapter"):
        check_adapters(policy)


def test_adapters_that_were_put_into_the_model_itself() -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    wrapped = trained(get_peft_model(llama(), config))
    injected = trained(inject_adapter_in_model(config, llama()))
    assert has_adapters(injected)
    assert_equal(sent(injected), sent(wrapped))


def test_under_autocast_the_merge_stays_in_float32() -> None:
    policy = adapted(llama())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = sent(policy)
    assert_equal(under, sent(policy))


def test_the_sign_comes_last() -> None:
    policy = adapted(llama())
    weight = dict(named_weights(policy))[f"{Q}.weight"]
    assert torch.equal((-weight).merged(), -weight.merged())


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation under it made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_nothing_is_computed_before_it_is_read_and_then_one_matrix() -> None:
    policy = adapted(llama())
    with Largest() as largest:
        weights = dict(named_weights(policy))
        check_adapters(policy)
        computed = [each for each in weights.values() if isinstance(each, LoraWeight)]
    assert len(computed) == 14 and largest.elements <= max(each.numel() for each in policy.parameters())
    with Largest() as largest:
        new = computed[0].merged()
    assert largest.elements == computed[0].shape.numel()
    memory = torch.empty(computed[0].shape.numel())
    given = computed[0].merged(memory)
    assert given.data_ptr() == memory.data_ptr() and torch.equal(given, new)


def test_bytes_are_those_of_base_and_factors() -> None:
    weight = dict(named_weights(adapted(llama(dtype=torch.bfloat16))))[f"{Q}.weight"]
    assert weight.num_bytes == 16 * 16 * 2 + (3 * 16 + 16 * 3) * 4


def quantised() -> nn.Module:
    policy = adapted(llama())
    base = policy.base_model.model.get_submodule(Q).base_layer
    base.weight = nn.Parameter(torch.zeros(16 * 16 // 2, 1, dtype=torch.uint8), requires_grad=False)
    return policy


def packed_weights() -> nn.Module:
    policy = adapted(llama())
    base = policy.base_model.model.get_submodule(Q).base_layer
    del base.weight
    base.register_buffer("qweight", torch.zeros(2, 16, dtype=torch.int32))
    return policy


class Scaled(torch.Tensor):
    """As torchao's: a subclass whose bytes are not its numbers."""


def of_a_subclass() -> nn.Module:
    policy = adapted(llama())
    base = policy.base_model.model.get_submodule(Q).base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Scaled), requires_grad=False)
    return policy


def experts() -> nn.Module:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Module()
            self.inside.weights = nn.Parameter(torch.randn(2, 4, 4))

    return get_peft_model(Experts(), LoraConfig(r=2, target_modules=[], target_parameters=["inside.weights"]))


def of_method(config: Any) -> nn.Module:
    return get_peft_model(llama(), config)


REFUSED = {
    "DoRA": (lambda: adapted(llama(), use_dora=True), "is DoRA: more than W.*use_dora=False"),
    "a bias": (lambda: adapted(llama(attention_bias=True), lora_bias=True, target_modules=["q_proj"]),
               "'default' of the policy's model.layers.0.self_attn.q_proj has a bias of its own.*lora_bias=False"),
    "a variant": (lambda: adapted(llama(), alora_invocation_tokens=[1], task_type="CAUSAL_LM"), "is ALoraLinear"),
    "4 bits": (quantised, "q_proj .Linear. has a weight of torch.uint8.*without a quantization_config"),
    "GPTQ": (packed_weights, "has no weight of its own.*without a quantization_config"),
    "torchao": (of_a_subclass, "has a weight of Scaled.*without a quantization_config"),
    "IA3": (lambda: of_method(IA3Config(target_modules=["q_proj"], feedforward_modules=[])), "is of PEFT's IA3"),
    "LoHa": (lambda: of_method(LoHaConfig(target_modules=["q_proj"])), "is of PEFT's LOHA.*merge_and_unload"),
    "prompts": (lambda: of_method(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "PROMPT_TUNING"),
    "single tokens": (lambda: adapted(llama(tied=False), trainable_token_indices=[1, 2]), "modules_to_save takes"),
    "experts": (experts, "is ParamWrapper"),
    "one of two tied": (lambda: adapted(llama(), target_modules=["embed_tokens"]),
                        "embed_tokens.weight and lm_head.weight are tied.*ensure_weight_tying=True"),
    "one of two tied replaced": (lambda: adapted(llama(), modules_to_save=["embed_tokens"]),
                                 "embed_tokens.weight and lm_head.weight are tied"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_merged_is_refused(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        check_adapters(make())


def test_a_plain_policy_is_taken_as_it_was() -> None:
    model = llama()
    assert not has_adapters(model)
    check_adapters(model)
    weights = dict(named_weights(model))
    assert all(weights[name].data_ptr() == each.data_ptr() for name, each in model.named_parameters())
