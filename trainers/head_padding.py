"""Attention heads of zeros, so that a tensor-parallel size divides a model's head counts.

Notation: q query heads, k key-value heads, d their size, r = q / k query heads that share a key-value head.
Query head i reads key-value head i // r. Whole groups (one key-value head with its r query heads) are added at
the end, so every real query head keeps its key-value head. A padded head has zero rows in the q, k and v
projections and zero columns in the output projection: it adds exactly 0 to the output, and since both its v and
its o are zero, no gradient reaches it. Training leaves it at zero. (LoRA's adapters do reach it: their products are not
zero there. It is then one head more that learns.)

So the logits are bit-identical, as long as the matrix library adds up the real columns of the output projection in
the same order when zeros follow them. It does in bfloat16, and in float32 for SmolLM2's 9 heads of 64 and for small
models; between about 150 and 380 real columns MKL picks another float32 kernel, and a product of unit normals
moves by 3e-5.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def padded_head_counts(num_heads: int, num_kv_heads: int, tensor_parallel_size: int) -> tuple[int, int]:
    """The smallest head counts that the tensor-parallel size divides, with the given query heads a key-value head.

    Fewer key-value heads than ranks are fine where they divide the ranks: the engine gives each to several ranks.

    Args:
        num_heads: query heads; a multiple of num_kv_heads.
        num_kv_heads: key-value heads.
        tensor_parallel_size: ranks that share the heads.

    Returns:
        (query heads, key-value heads); the given ones where nothing needs padding.

    Raises:
        ValueError: if a number is below 1, or num_kv_heads does not divide num_heads.

    >>> padded_head_counts(9, 3, tensor_parallel_size=2)
    (12, 4)
    >>> padded_head_counts(8, 2, tensor_parallel_size=4)
    (8, 2)
    """
    if min(num_heads, num_kv_heads, tensor_parallel_size) < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads, {num_kv_heads} key-value heads, tensor_parallel_size {tensor_parallel_size}: "
            "all must be at least 1, and the query heads a multiple of the key-value heads"
        )
    kv_heads_fit = num_kv_heads % tensor_parallel_size == 0 or tensor_parallel_size % num_kv_heads == 0
    if kv_heads_fit and num_heads % tensor_parallel_size == 0:
        return num_heads, num_kv_heads
    groups = -(-num_kv_heads // tensor_parallel_size) * tensor_parallel_size
    return num_heads // num_kv_heads * groups, groups


def pad_attention_heads(model: PreTrainedModel, tensor_parallel_size: int) -> PreTrainedModel:
    """A copy of the model with the same logits, whose head counts the tensor-parallel size divides.

    Its config has the new `num_attention_heads` and `num_key_value_heads`, and names `head_dim`, which stays.

    Args:
        model: a causal language model with q_proj, k_proj, v_proj and o_proj in every layer (Llama, Mistral,
            Qwen2, Qwen3, ...), with biases or without. It is not changed.
        tensor_parallel_size: ranks that shall share the heads.

    Returns:
        A new model that shares no memory with `model`; `model` itself where nothing needs padding.

    Raises:
        ValueError: if the model's attention is built otherwise, or some other parameter's size hangs on the heads.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=32, hidden_size=96, intermediate_size=64, num_hidden_layers=1,
    ...     num_attention_heads=3, num_key_value_heads=3))
    >>> padded = pad_attention_heads(model, tensor_parallel_size=2)
    >>> padded.config.num_attention_heads, padded.config.head_dim
    (4, 32)
    >>> padded.model.layers[0].self_attn.q_proj.weight.shape, padded.model.layers[0].self_attn.o_proj.weight.shape
    (torch.Size([128, 96]), torch.Size([96, 128]))
    """
    num_heads, num_kv_heads, head_dim = _heads_of(model)
    new_heads, new_kv_heads = padded_head_counts(num_heads, num_kv_heads, tensor_parallel_size)
    if (new_heads, new_kv_heads) == (num_heads, num_kv_heads):
        return model

    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = new_heads, new_kv_heads, head_dim
    new_rows = {
        "q_proj": (new_heads - num_heads) * head_dim,
        "k_proj": (new_kv_heads - num_kv_heads) * head_dim,
        "v_proj": (new_kv_heads - num_kv_heads) * head_dim,
    }
    state = {}
    for name, tensor in model.state_dict().items():
        projection, kind = name.split(".")[-2:]
        if projection in new_rows:  # weight (rows, hidden) or bias (rows,): zeros below
            state[name] = _append_zeros(tensor, new_rows[projection], dim=0)
        elif projection == "o_proj" and kind == "weight":  # (hidden, columns): zeros to the right
            state[name] = _append_zeros(tensor, new_rows["q_proj"], dim=1)
        else:
            state[name] = tensor.clone()
    return _build_like(model, config, state)


def _heads_of(model: PreTrainedModel) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size), once every layer is seen to be built as the padding expects."""
    config = model.config
    num_heads = getattr(config, "num_attention_heads", None)
    num_kv_heads = getattr(config, "num_key_value_heads", None)
    attentions = [
        module
        for module in model.modules()
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in PROJECTIONS)
    ]
    num_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int) or len(attentions) != num_layers:
        raise ValueError(
            f"{type(model).__name__} has {len(attentions)} attention layers with linear {', '.join(PROJECTIONS)} out "
            f"of {num_layers}, {num_heads} query heads and {num_kv_heads} key-value heads; padding needs the "
            "projections in every layer and both counts. Take a tensor_parallel_size that divides the heads instead"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    for attention in attentions:
        q, k, v, o = (getattr(attention, name) for name in PROJECTIONS)
        sizes = (q.out_features, k.out_features, v.out_features, o.in_features)
        if sizes != (q_size, kv_size, kv_size, q_size):
            raise ValueError(
                f"{type(model).__name__} has {', '.join(PROJECTIONS)} of sizes {sizes}, which are not {num_heads} "
                f"query and {num_kv_heads} key-value heads of size {head_dim}; such a model cannot be padded. Take a "
                "tensor_parallel_size that divides its heads instead"
            )
    return num_heads, num_kv_heads, head_dim


def _append_zeros(tensor: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _build_like(model: PreTrainedModel, config, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the same class with this config, these parameters, and the buffers and mode of `model`."""
    # On the meta device: no memory and no random numbers are spent on weights that are replaced at once.
    with torch.device("meta"):
        built = type(model)(config)
    strange = [name for name, tensor in built.state_dict().items() if tensor.shape != state[name].shape]
    if strange:
        raise ValueError(
            f"{type(model).__name__} has parameters beside {', '.join(PROJECTIONS)} whose size hangs on the number "
            f"of heads ({strange[0]}, ...); such a model cannot be padded. Take a tensor_parallel_size that divides "
            "its heads instead"
        )
    built.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        built.get_submodule(owner)._buffers[leaf] = buffer.clone()
    built.tie_weights()
    built.generation_config = copy.deepcopy(model.generation_config)
    for ours, theirs in zip(built.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    assert not any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
    return built.train(model.training)
