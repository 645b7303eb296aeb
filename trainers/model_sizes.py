"""How large a model is, from its Hugging Face config alone: built on torch's meta device, no weight is ever read."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainers.config import LoraConfig
from trainers.errors import ConfigError
from trainers.lora import target_layers

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""A layer's matrices, in Llama, Mistral, Qwen 2 and 3, SmolLM: what the planner's formulas are of."""


@dataclass(frozen=True)
class ModelSizes:
    """A dense decoder's sizes, in elements; parameters are of all layers together.

    Attributes:
        name: path or hub name.
        layers: decoder layers.
        hidden: width of the residual stream.
        intermediate: width inside the gated MLP.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: of both.
        vocabulary: rows of the embedding.
        positions: that the model was made for.
        windows: True if a layer has a sliding window or a soft cap, so that the trainer keeps padded rows.
        head_norms: True if queries and keys are normed head by head, as in Qwen 3.
        embedding: parameters of the input embedding.
        head: parameters of the output head; 0 where it is the embedding.
        matrices: parameters of the layers' matrices.
        biases: parameters of the matrices' biases.
        norms: every other parameter.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    windows: bool
    head_norms: bool
    embedding: int
    head: int
    matrices: int
    biases: int
    norms: int

    @property
    def parameters(self) -> int:
        """All of them, a tied head once."""
        return self.embedding + self.head + self.matrices + self.biases + self.norms

    @property
    def query(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.kv_heads * self.head_dim

    def as_critic(self) -> "ModelSizes":
        """The trunk of the same model, with a value head in the place of the language model's."""
        return dataclasses.replace(self, head=0, norms=self.norms + self.hidden + 1)


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters of all layers together.

    Attributes:
        rank: of each.
        layers: matrices that have one.
        inputs: sum of these matrices' inputs,
        outputs: and of their outputs.
    """

    rank: int
    layers: int
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Of A (rank, inputs) and B (outputs, rank)."""
        return self.rank * (self.inputs + self.outputs)


def sizes_of(path: str) -> ModelSizes:
    """Of a local folder that has a config.json, or of a hub name, of which nothing but the config is fetched.

    Raises:
        ConfigError: if there is no such config, or the model is none that the planner's formulas know.
    """
    return count(_config_of(path), path)


def adapters_of(path: str, lora: LoraConfig) -> Adapters | None:
    """What `lora` puts into the model; None without a rank.

    Raises:
        ConfigError: as `sizes_of`, or if a name of lora.target_modules fits no layer.
    """
    return None if lora.rank is None else adapters_in(_without_weights(_config_of(path)), lora)


def adapters_in(model: PreTrainedModel, lora: LoraConfig) -> Adapters | None:
    """The same of a model, which need not have weights."""
    if lora.rank is None:
        return None
    found = [model.get_submodule(name) for name in target_layers(model, lora.target_modules)]
    inputs, outputs = (sum(getattr(each, side) for each in found) for side in ("in_features", "out_features"))
    return Adapters(lora.rank, len(found), inputs, outputs)


def _config_of(path: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such name, no network, a broken file
        raise ConfigError(
            f"model.path is {path!r}, whose config cannot be read: {error}. Give a hub name that this machine can "
            "reach, or a folder with the model's config.json; the weights are not needed"
        ) from error


def _without_weights(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def count(config: PretrainedConfig, name: str = "") -> ModelSizes:
    """The sizes of a config's model.

    Raises:
        ConfigError: if its layers are not the ones that the formulas know.

    >>> from transformers import LlamaConfig
    >>> small = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> sizes = count(LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True))
    >>> sizes.matrices == 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64), sizes.norms == 5 * 32, sizes.head
    (True, True, 0)
    """
    model = _without_weights(config)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    of_trunk = {key: module for key, module in model.base_model.named_modules() if isinstance(module, nn.Linear)}
    found = {key.rpartition(".")[2] for key in of_trunk}
    if found != LINEARS or any(parameter.dim() > 2 for parameter in model.parameters()):
        raise ConfigError(
            f"model.path is {name!r}, a {type(model).__name__} whose layers multiply by {', '.join(sorted(found))}; "
            f"the planner knows dense models that have {', '.join(sorted(LINEARS))} (Llama, Mistral, Qwen 2 and 3)"
        )
    text: Any = config.get_text_config()
    matrices = sum(module.weight.numel() for module in of_trunk.values())
    biases = sum(module.bias.numel() for module in of_trunk.values() if module.bias is not None)
    tied = head is embedding
    everything = sum(parameter.numel() for parameter in model.parameters())  # a tied one once
    outside = embedding.numel() + (0 if tied else head.numel())
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = set(getattr(text, "layer_types", None) or ())
    return ModelSizes(
        name=name,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=head_dim,
        vocabulary=embedding.shape[0],
        positions=text.max_position_embeddings,
        windows="sliding_attention" in kinds or getattr(text, "attn_logit_softcapping", None) is not None,
        head_norms=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        embedding=embedding.numel(),
        head=0 if tied else head.numel(),
        matrices=matrices,
        biases=biases,
        norms=everything - outside - matrices - biases,
    )
