"""What the tests share: the models, and marks by folder."""

import os
from pathlib import Path

import pytest

from scripts.bench.inputs import SMALL_LLAMA, random_llama

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = ROOT / "models" / "smollm2-135m-tp2"
MARKED_FOLDERS = ("distributed", "engine", "faults", "smoke", "gpu")

# No test asks a server for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its folder's name, and skip what needs a GPU where there is none."""
    for item in items:
        folder = item.path.parent.name
        if folder in MARKED_FOLDERS:
            item.add_marker(folder)
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not _has_gpu():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch  # seconds to import: only where a test needs to know

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model: SmolLM2-135M-Instruct in bfloat16, its heads padded for two ranks."""
    if not (DEFAULT_MODEL / "config.json").exists():
        pytest.fail(f"{DEFAULT_MODEL.relative_to(ROOT)} is not there; run `make model` first", pytrace=False)
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def tiny_model_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in float32 with the default model's tokenizer: it starts fast and talks nonsense.

    `SMALL_LLAMA` says why it has the shape that it has.
    """
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    _save_tiny_llama(folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_vocabulary_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model_path`, with 512 words, an output head of its own and no tokenizer: for prompts of token ids."""
    folder = tmp_path_factory.mktemp("small-vocabulary-model")
    _save_tiny_llama(folder, vocab_size=512, eos_token_id=2, tie_word_embeddings=False)
    return folder


def _save_tiny_llama(folder: Path, vocab_size: int, eos_token_id: int, tie_word_embeddings: bool = True) -> None:
    shape = {"vocab_size": vocab_size, "tie_word_embeddings": tie_word_embeddings, **SMALL_LLAMA}
    random_llama(eos_token_id=eos_token_id, **shape).save_pretrained(folder)
