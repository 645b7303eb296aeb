"""What the planner says that autograd keeps of a pass, against what it keeps."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainers.activations import Pass, Precision, Shape, kept_bytes, passes, rank_batch
from trainers.batching import TrainBatch
from trainers.config import LoraConfig
from trainers.lora import add_adapters
from trainers.model_sizes import adapters_in, count
from trainers.policy import Policy

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=32)),
}


def saved_bytes(policy: Policy, batch: TrainBatch, autocast: bool) -> int:
    """Of all storages that autograd holds after a forward pass, each once, the parameters' own left out."""
    parameters = {each.untyped_storage().data_ptr() for each in policy.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        policy(batch, entropy=True)
    return sum(storage.nbytes() for storage in held.values())


def built(kind: type[PreTrainedModel], config: object, dtype: torch.dtype, implementation: str = "sdpa") -> Policy:
    torch.manual_seed(0)
    model = kind(config).to(dtype)
    model.set_attn_implementation(implementation)
    return Policy(model)


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", "bf16"), ("float32", "no"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n", [1, 8])
def test_what_autograd_keeps(name: str, dtype: str, autocast: str, n: int) -> None:
    kind, config = MODELS[name]
    policy = built(kind, config, getattr(torch, dtype))
    assert policy.packs
    batch = rank_batch([40, 40, 45, 50], n, response=60)
    (step,) = passes(batch, token_budget=10**6, packed=True)
    found = saved_bytes(policy, batch, autocast == "bf16")
    assert kept_bytes(count(config), step, Precision.of(dtype, autocast, on_cpu=True)) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [("float32", "bf16"), ("float32", "no"), ("bfloat16", "bf16"), ("bfloat16", "no")]
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_what_autograd_keeps_beside_adapters(name: str, dtype: str, autocast: str) -> None:
    kind, config = MODELS[name]
    model, lora = kind(config).to(getattr(torch, dtype)), LoraConfig(rank=8)
    adapters = adapters_in(model, lora)
    add_adapters(model, lora, "unused")
    model.set_attn_implementation("sdpa")
    batch = rank_batch([40, 40, 45, 50], 8, response=60)
    (step,) = passes(batch, token_budget=10**6, packed=True)
    found = saved_bytes(Policy(model), batch, autocast == "bf16")
    precision = Precision.of(dtype, autocast, on_cpu=True)
    assert kept_bytes(count(config), step, precision, adapters=adapters) == pytest.approx(found, rel=0.02)


def test_a_pass_is_laid_out_as_the_trainer_does() -> None:
    """Two prompts with 3 responses of 10: each prompt once, a response's last token not at all."""
    batch = rank_batch([5, 7], 3, response=10)
    (whole,) = passes(batch, token_budget=1000, packed=True)
    assert whole == Pass(5 + 7 + 6 * 9, 60, (Shape(2, 7), Shape(6, 9, 7)))
    (rows,) = passes(batch, token_budget=1000, packed=False)
    assert rows == Pass(6 * 17, 60, (Shape(6, 17),))
    (observed,) = passes(rank_batch([5, 7], 3, response=10, observed=6), token_budget=1000, packed=True)
    assert observed == Pass(5 + 7 + 6 * 15, 60, (Shape(2, 7), Shape(6, 15, 7))), (
        "what an environment said predicts nothing"
    )
    cut = passes(batch, token_budget=32, packed=True)
    assert [each.tokens for each in cut] == [7 + 2 * 9, 7 + 9 + 5 + 9, 5 + 2 * 9]
