"""Adapters of low rank (LoRA) in the policy: put in by PEFT, switched off for the reference, written by themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainers.across_ranks import is_main, whole
from trainers.config import LoraConfig
from trainers.errors import ConfigError

ADAPTER = "default"  # its name in PEFT


def add_adapters(language_model: PreTrainedModel, lora: LoraConfig, base: str) -> None:
    """Put adapters into the model's linear layers, in place, and freeze everything else.

    They are float32, whatever the model is, and add nothing at first: B is zero.

    Args:
        base: the model's path, for who loads the adapter alone.

    Raises:
        ConfigError: if a name of lora.target_modules fits no such layer.
    """
    import peft  # seconds to import: only for those who use it

    assert lora.rank is not None
    names = target_layers(language_model, lora.target_modules)
    like_conv1d = isinstance(language_model.get_submodule(names[0]), Conv1D)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        fan_in_fan_out=like_conv1d,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    peft.inject_adapter_in_model(settings, language_model, ADAPTER)
    for parameter in language_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def check_target_modules(path: str, lora: LoraConfig) -> None:
    """See that adapters can be put where the config wants them; of the model only its config is read.

    Raises:
        ConfigError: as of `add_adapters`.
    """
    if lora.rank is not None and lora.target_modules:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        target_layers(model, lora.target_modules)


def target_layers(language_model: PreTrainedModel, wanted: list[str]) -> list[str]:
    """Full names of the linear layers that get adapters.

    Args:
        wanted: ends of such names, at a dot; [] means all layers.

    Raises:
        ConfigError: if one fits none.
    """
    head = language_model.get_output_embeddings()
    layers = [
        name
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    for each in wanted:
        if not any(f".{name}".endswith(f".{each}") for name in layers):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"lora.target_modules has {each!r}, which is no linear layer of {type(language_model).__name__}'s "
                f"trunk; there are {there}. (The embedding and the head take no adapters: the loss reads their "
                "matrices as they are.)"
            )
    return [name for name in layers if not wanted or any(f".{name}".endswith(f".{each}") for each in wanted)]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that it was before adapters were put in; one that has none stays as it is."""
    layers = [module for module in model.modules() if "base_layer" in module._modules]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)  # type: ignore[operator]
        for parameter in trained:  # PEFT freezes them; FSDP2, which makes whole ones in the first pass, would remember
            parameter.requires_grad_(True)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # type: ignore[operator]


def has_adapters(language_model: PreTrainedModel) -> bool:
    """True after `add_adapters`."""
    return bool(getattr(language_model, "peft_config", None))


def save_adapter(folder: Path, language_model: PreTrainedModel) -> None:
    """Write the adapters alone, as `PeftModel.from_pretrained(MODEL, folder)` reads them; the folder is made.

    Rank 0 does; of a sharded model all ranks call it together.
    """
    import peft

    state = peft.get_peft_model_state_dict(language_model, adapter_name=ADAPTER)
    # PEFT's own wrapper, under which it looks for them, is two levels above the model.
    named = {f"base_model.model.{name}": whole(tensor).contiguous() for name, tensor in state.items()}
    if not is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy(language_model.peft_config[ADAPTER])
    settings.inference_mode = True
    settings.save_pretrained(folder)
