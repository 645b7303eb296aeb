"""Evaluates with an engine that answers from a table, and writes each rank's figures: `torchrun ... OUTPUT_FOLDER`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch.distributed as dist

from rollout import RolloutBatch, SamplingConfig, init_world
from trainers.config import EvaluationConfig
from trainers.data import Example
from trainers.evaluation import evaluate


class TableEngine:
    """Prompt [p] gets, greedy, a response of p + 1 tokens; of n samples the first p get token 1, the rest token 0."""

    def __init__(self) -> None:
        self.world = init_world()
        self.calls: list[tuple[int, SamplingConfig, int]] = []

    def generate(self, prompts: Sequence[list[int]], sampling: SamplingConfig, *, seed: int) -> RolloutBatch:
        self.calls.append((len(prompts), sampling, seed))
        rows = [(prompt, j) for prompt in prompts for j in range(sampling.n)]
        greedy = sampling.temperature == 0
        responses = [[p % 2] * (p + 1) if greedy else [int(j < p)] for (p,), j in rows]
        lengths = np.array([len(response) for response in responses], np.int32)
        return RolloutBatch(
            prompt_ids=np.array([p for (p,), _ in rows], np.int32),
            prompt_lengths=np.ones(len(rows), np.int32),
            response_ids=np.concatenate(responses).astype(np.int32),
            response_lengths=lengths,
            logprobs=np.zeros(lengths.sum(), np.float32),
            finished=lengths < 4,
            prompt_index=np.repeat(np.arange(len(prompts), dtype=np.int32), sampling.n),
            version=0,
        )


class Words:
    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return [str(response) for response in ids]


def last_token(rollouts: RolloutBatch, examples: Sequence[Example]) -> np.ndarray:
    return np.array([rollout.response_ids[-1] for rollout in rollouts], np.float32)


def main(folder: Path) -> None:
    found = {}
    for count in (5, 4, 1):
        engine = TableEngine()
        examples = [Example([number], "", f"prompt {number}") for number in range(count)]
        config = EvaluationConfig(n=4, k=2)
        sampling = SamplingConfig(temperature=0.7, top_k=5, n=8, max_tokens=9)
        metrics, outcomes = evaluate(engine, examples, last_token, Words(), sampling, config)
        asked = [(prompts, asdict(sampling), seed) for prompts, sampling, seed in engine.calls]
        found[count] = {"metrics": metrics, "outcomes": [asdict(each) for each in outcomes], "asked": asked}
    (folder / f"rank{engine.world.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
