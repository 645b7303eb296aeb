"""A policy as a folder that transformers and vLLM load."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rollout import merged_state
from trainers.across_ranks import is_main, whole
from trainers.lora import has_adapters, save_adapter


def export_policy(
    folder: Path, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """Write weights, config and tokenizer; of a policy with adapters the merged weights, and in `adapter` these alone.

    Rank 0 does; of a sharded policy all ranks call it together.

    Args:
        folder: made if need be; what is in it is overwritten.
        dtype: of the written weights, "float32", "bfloat16" or "float16".
    """
    state = exported_state(language_model, getattr(torch, dtype))
    if has_adapters(language_model):
        save_adapter(folder / "adapter", language_model)
    if is_main():
        language_model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def exported_state(language_model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of `export_policy` by name, on rank 0's CPU; nothing on other ranks."""
    if not has_adapters(language_model):
        return whole_state(language_model, dtype)
    return {name: tensor.cpu() for name, tensor in merged_state(language_model, dtype) if is_main()}


def whole_state(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All of the module's tensors, on rank 0's CPU; nothing on other ranks. A collective if the module is sharded.

    One tensor at a time is whole on a rank's device, and rank 0 has all of them in the dtype given: no more. What two
    names share (a tied head) is one tensor here, too, and so comes once into a file.

    >>> whole_state(torch.nn.Linear(1, 2, bias=False), torch.bfloat16)["weight"].dtype
    torch.bfloat16
    """
    state: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if (known := names.setdefault(id(tensor), name)) != name:
            if is_main():
                state[name] = state[known]
            continue
        gathered = whole(tensor.detach().to(dtype))
        if is_main():
            state[name] = gathered.to("cpu")
    return state


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
