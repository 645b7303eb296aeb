"""A policy as a folder that transformers and vLLM load."""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.sharding import whole


def export_policy(
    folder: Path, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """Write weights, config and tokenizer; rank 0 does, and of a sharded policy all ranks call it together.

    Args:
        folder: made if need be; what is in it is overwritten.
        dtype: of the written weights, "float32", "bfloat16" or "float16".
    """
    state = whole_state(language_model, getattr(torch, dtype))
    if not _is_main():
        return
    language_model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


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
            if _is_main():
                state[name] = state[known]
            continue
        gathered = whole(tensor.detach().to(dtype))
        if _is_main():
            state[name] = gathered.to("cpu")
    return state


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


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
    from trainers.policy import load_policy

    about = read_about(checkpoint)
    path = model or about.config["model"]["path"]
    language_model = load_policy(path, about.config["model"]["dtype"]).language_model
    tensors = {f"policy.language_model.{name}": weight.detach() for name, weight in language_model.named_parameters()}
    read_tensors(checkpoint, tensors)  # in place
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    export_policy(folder, language_model, tokenizer, about.config["rollout"]["dtype"])
    return about.step
