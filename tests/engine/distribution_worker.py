"""Runs in every rank: many first tokens of a few prompts, on the real model in float32; written to OUT.npz by rank 0.

torchrun --nproc_per_node=2 distribution_worker.py MODEL OUT ours|stock
"""

import os
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

PROMPTS = ([1, 504, 2365, 282, 4649, 314], [1, 1780, 314, 260, 1552, 354, 253, 2232, 284, 28], [1, 657, 5948, 30])
SAMPLES = 768
TEMPERATURE = 0.8


def ours(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and log-probs, (prompts, SAMPLES)."""
    from rollout import RolloutConfig, RolloutEngine, SamplingConfig

    config = RolloutConfig(dtype="float32", max_model_len=32, kv_cache_gib=0.5, enforce_eager=True)
    with RolloutEngine(model, config) as engine:
        sampling = SamplingConfig(temperature=TEMPERATURE, max_tokens=1, n=SAMPLES)
        batch = engine.generate(PROMPTS if engine.world.rank == 0 else [], sampling)
        shape = (len(batch) // SAMPLES, SAMPLES)
        return batch.response_ids.reshape(shape), batch.logprobs.reshape(shape)


def stock(model: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of vLLM's own LLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        max_model_len=32,
        kv_cache_memory_bytes=2**29,
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        skip_tokenizer_init=True,
    )
    params = SamplingParams(temperature=TEMPERATURE, max_tokens=1, n=SAMPLES, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in PROMPTS], params, use_tqdm=False)
    tokens = np.array([[each.token_ids[0] for each in output.outputs] for output in outputs])
    logprobs = np.array([[each.logprobs[0][each.token_ids[0]].logprob for each in one.outputs] for one in outputs])
    return tokens, logprobs


def reference(model: str) -> np.ndarray:
    """(prompts, vocabulary) float64: the distribution of the first token, by the model in transformers."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = torch.stack([policy(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    return (logits.double() / TEMPERATURE).log_softmax(-1).numpy()


def main() -> None:
    model, out, system = sys.argv[1:]
    tokens, logprobs = (ours if system == "ours" else stock)(model)
    if os.environ.get("RANK", "0") == "0":
        np.savez(out, tokens=tokens, logprobs=logprobs, reference=reference(model))


if __name__ == "__main__":
    main()
