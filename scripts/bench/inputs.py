"""What the systems are fed: the prompts, and a model that they can load."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HUB_NAME = "HuggingFaceH4/MATH-500"
SHARED_COPY = Path(__file__).resolve().parents[3] / "shared" / "data" / "math500.jsonl"


def find_prompts(given: Path | None, folder: Path) -> Path:
    """A JSON-lines file with the key "problem": the one given, else a copy beside the repository, else the hub's.

    Args:
        folder: where a copy from the hub is written.

    Raises:
        ValueError: if there is none, or the file has another form.
    """
    if given is not None:
        return _checked(given)
    if SHARED_COPY.exists():
        return _checked(SHARED_COPY)
    import datasets

    try:
        problems = datasets.load_dataset(HUB_NAME, split="test")["problem"]
    except Exception as error:  # of many kinds: no network, offline, no such name
        raise ValueError(
            f"no prompts: {HUB_NAME} cannot be loaded from the hub ({error}). Give --prompts FILE.jsonl, each "
            'line such as {"problem": "What is 1+1?"}'
        ) from error
    copy = folder / "math500.jsonl"
    copy.write_text("".join(json.dumps({"problem": problem}) + "\n" for problem in problems), encoding="utf-8")
    return copy


def _checked(file: Path) -> Path:
    """The absolute path of a file of the right form."""
    wanted = 'give JSON lines, each such as {"problem": "What is 1+1?"}'
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        texts = [json.loads(line)["problem"] for line in lines]
    except OSError as error:
        raise ValueError(f"--prompts is {file}, which cannot be read ({error.strerror}): {wanted}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'--prompts is {file}, of which a line has no "problem": {wanted}') from error
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"--prompts is {file}, which has an empty problem or none: {wanted}")
    return file.absolute()


def check_model(model: str, tensor_parallel_size: int) -> None:
    """Refuse, before anything is started, what cannot be loaded or split.

    Raises:
        ValueError: if transformers knows no such model, or the ranks cannot share its heads.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    except Exception as error:  # of many kinds: no such name, no network, a config that contradicts itself
        raise ValueError(f"--model is {model!r}; give a local folder or a hub name: {error}") from error
    heads = config.num_attention_heads
    if heads % tensor_parallel_size:
        raise ValueError(
            f"--tensor-parallel-size is {tensor_parallel_size}, which does not divide the {heads} attention heads of "
            f"{model}: pad them with python scripts/prepare_model.py --tensor-parallel-size {tensor_parallel_size} "
            "--source MODEL --output FOLDER, or take another size"
        )


def one_layer_copy(model: str, folder: Path) -> Path:
    """A random one-layer model with the configuration and tokenizer of another.

    On the simulated accelerator no forward runs, so that further layers would cost start-up time and KV memory alone;
    scheduler, batch and inputs do not know how many there are.

    Args:
        model: local folder or hub name.
        folder: to write.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    transformers.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    return folder


SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
"""Starts fast and talks nonsense. Heads of 32 are the least that vLLM's CPU attention takes; the weights are large
enough that its distributions are far from uniform, so that a stale one shows."""


def random_llama(eos_token_id: int = 2, **config: Any) -> "LlamaForCausalLM":
    """A random Llama in float32, the same each time; the caller's random streams stay where they are.

    Args:
        config: of LlamaConfig.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": eos_token_id, "pad_token_id": eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config, **ends))
    model.generation_config = GenerationConfig(**ends)
    return model
