"""A policy as a folder that transformers and vLLM load."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rollout import merged_state
from trainers.lora import has_adapters, save_adapter


def export_policy(
    folder: Path, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """Write weights, config and tokenizer; of a policy with adapters the merged weights, and in `adapter` these alone.

    Args:
        folder: made if need be; what is in it is overwritten.
        dtype: of the written weights, "float32", "bfloat16" or "float16".
    """
    if has_adapters(language_model):
        state = dict(merged_state(language_model, getattr(torch, dtype)))
        save_adapter(folder / "adapter", language_model)
    else:
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in language_model.state_dict().items()}
    language_model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def export_checkpoint(checkpoint: Path, folder: Path, model: str | None = None) -> int:
    """Write a checkpoint's policy as the end of its run would have; one process, on the CPU.

    Args:
        checkpoint: its folder.
        folder: to write.
        model: where the run's first model lies now, for its config and tokenizer; None: where it lay then.

    Returns:
        The step of the checkpoint.

    Raises:
        ConfigError: if the checkpoint cannot be read, or is of another model.
    """
    from transformers import AutoTokenizer

    from trainers.checkpoint import read_about, read_tensors
    from trainers.config import LoraConfig
    from trainers.policy import load_policy

    about = read_about(checkpoint)
    path = model or about.config["model"]["path"]
    lora = LoraConfig(**about.config.get("lora", {}))
    language_model = load_policy(path, about.config["model"]["dtype"], lora=lora).language_model
    tensors = {
        f"policy.language_model.{name}": weight.detach()
        for name, weight in language_model.named_parameters()
        if weight.requires_grad
    }
    read_tensors(checkpoint, tensors)  # in place
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    export_policy(folder, language_model, tokenizer, about.config["rollout"]["dtype"])
    return about.step
