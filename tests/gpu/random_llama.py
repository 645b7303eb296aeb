"""A random Llama of 0.3 billion parameters: large enough to load a GPU, written in seconds, nothing to download."""

from pathlib import Path

import torch

from scripts.bench.inputs import random_llama

VOCABULARY = 49152


def write_random_llama(folder: Path) -> None:
    """24 layers of 1024, 16 query and 8 key-value heads of 64, tied embeddings, bfloat16.

    The weights are twice as large as usual, so that its distributions are far from uniform and a stale layer shows.
    """
    model = random_llama(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
