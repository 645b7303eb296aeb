"""Runs in every rank: sync a changed policy, then again with one part left stale; the gaps go to OUT/rankN.json.

torchrun --nproc_per_node=2 weights_worker.py MODEL OUT DTYPE
"""

import copy
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import rollout.weights
from rollout import RolloutBatch, RolloutConfig, RolloutEngine, SamplingConfig

STALE_PARTS = ("embed_tokens", "layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.up_proj")


def changed(policy: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Every matrix a good deal away from what the engine was built from; the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.0 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def logprob_gap(policy: PreTrainedModel, batch: RolloutBatch, dtype: torch.dtype) -> tuple[float, float]:
    """Mean and largest |engine - policy| of the response tokens' log-probs.

    The policy's weights are rounded to the engine's dtype, as the sync does, and then compute in float32.
    """
    policy = copy.deepcopy(policy).to(dtype).float()
    gaps = []
    for row in batch:
        ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids]))[None].long()
        with torch.no_grad():
            logprobs = policy(ids).logits.float().log_softmax(-1)[0]
        responses = range(len(row.prompt_ids), ids.shape[1])
        ours = np.array([logprobs[position - 1, ids[0, position]].item() for position in responses])
        gaps.append(np.abs(ours - row.logprobs))
    gap = np.concatenate(gaps)
    return float(gap.mean()), float(gap.max())


def main() -> None:
    model, out, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    gap = partial(logprob_gap, dtype=getattr(torch, dtype))
    rank = int(os.environ.get("RANK", "0"))
    config = RolloutConfig(dtype=dtype, max_model_len=128, kv_cache_gib=0.25, block_size=32, enforce_eager=True)
    engine = RolloutEngine(model, config)
    policy = changed(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), seed=1)
    rng = np.random.default_rng(rank)
    prompts = [rng.integers(10, 400, size=12).tolist() for _ in range(16)]
    sampling = SamplingConfig(max_tokens=16, temperature=1.0, ignore_eos=True)
    results: dict = {"before_sync": gap(policy, engine.generate(prompts, sampling)), "versions": []}

    results["versions"].append(engine.generate(prompts, sampling).version)
    report = engine.sync_weights(policy, version=7)
    batch = engine.generate(prompts, sampling)
    results["versions"].append(batch.version)
    results["synced"] = gap(policy, batch)
    results["num_bytes"] = report.num_bytes
    # Samples of one prompt share its prefill: a copied block that is wrong shows in their log-probs. Prompts that end
    # within the first block, with it, right behind it and in the second.
    lengths = (1, 2, 31, 32, 33, 34, 45, 64, 65)
    grouped = [rng.integers(10, 400, size=length).tolist() for length in lengths]
    results["grouped"] = gap(policy, engine.generate(grouped, SamplingConfig(max_tokens=6, n=5, ignore_eos=True)))
    # Tempered sampling: the engine's log-probs are those of the distribution that it drew from.
    tempered = engine.generate(prompts, SamplingConfig(max_tokens=8, temperature=0.5, ignore_eos=True))
    results["tempered_as_plain"] = gap(policy, tempered)

    names = rollout.weights.named_weights
    parts = [*STALE_PARTS] + ([] if policy.config.tie_word_embeddings else ["lm_head"])
    for seed, part in enumerate(parts, start=2):
        old = {name: tensor.clone() for name, tensor in names(policy)}
        changed(policy, seed)

        def all_but_one(
            policy: PreTrainedModel, part: str = part, old: dict[str, torch.Tensor] = old
        ) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in names(policy):
                yield name, old[name] if part in name else tensor

        rollout.weights.named_weights = all_but_one
        engine.sync_weights(policy, version=seed + 10)
        results[f"stale {part}"] = gap(policy, engine.generate(prompts, sampling))
        rollout.weights.named_weights = names
        engine.sync_weights(policy, version=seed + 11)
        results[f"healed {part}"] = gap(policy, engine.generate(prompts, sampling))

    missing = dict(list(names(policy))[:-1])
    rollout.weights.named_weights = lambda _: iter(missing.items())
    try:
        engine.sync_weights(policy, version=99)
    except ValueError as error:
        results["missing"] = str(error)
    try:
        engine.generate(prompts, sampling)
    except RuntimeError as error:
        results["after_failed_sync"] = str(error)
    # Both ranks failed, and their watches would end them: what a test wants to know is known.
    (out / f"rank{rank}.json").write_text(json.dumps(results))
    engine.close()


if __name__ == "__main__":
    main()
