"""Runs in each of four ranks, two a replica: phases of made-up responses, shared out and brought back.

torchrun --nproc_per_node=4 balance_worker.py OUT
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist

from rollout import init_world
from rollout.balance import Balance, Shares
from rollout.driver import Collected
from rollout.types import Asked
from rollout.world import tensor_parallel_group

SIZE, MAX_TOKENS = 2, 40
PROMPTS_OF_RANKS = [[[rank, number] for number in range(count)] for rank, count in enumerate((5, 0, 7, 1))]


def response(prompt: list[int], sample: int) -> list[int]:
    """What every replica would answer: rank 0's prompts get the long responses."""
    length = (30 if prompt[0] == 0 else 3) + prompt[1] + sample
    return [1000 * prompt[0] + 100 * prompt[1] + 10 * sample + place % 10 for place in range(length)]


def samples_of(prompt: list[int]) -> int:
    return 1 + prompt[1] % 3


def answers(shares: Shares, replica: int, prompts: list[list[int]]) -> Collected:
    own = [(prompts[n], sample) for n in shares.of_replicas[replica] for sample in range(samples_of(prompts[n]))]
    collected = Collected.empty(len(own), MAX_TOKENS)
    for row, (prompt, sample) in enumerate(own):
        tokens = response(prompt, sample)
        collected.token_ids[row, : len(tokens)] = tokens
        collected.logprobs[row, : len(tokens)] = -np.array(tokens, np.float32) / 7
        collected.lengths[row], collected.finished[row] = len(tokens), sample == 0
    return collected


def waits(balance: Balance, rank: int) -> dict[str, float]:
    """The last rank is late."""
    beats: list[None] = []
    if rank == 3:
        time.sleep(1.0)
    return {"seconds": balance.wait_for_others(lambda: beats.append(None)), "beats": len(beats)}


def main() -> None:
    world = init_world()
    balance = Balance(tensor_parallel_group(world, world.size), SIZE)
    prompts = sum(PROMPTS_OF_RANKS, [])
    tokens, wrong = [], 0
    for _ in range(3):
        given = [
            [Asked(np.array(prompt, np.int32), samples_of(prompt), MAX_TOKENS) for prompt in of_rank]
            for of_rank in PROMPTS_OF_RANKS
        ]
        shares = balance.shares(given)
        collected = answers(shares, world.rank // SIZE, prompts)
        tokens.append(int(collected.lengths.sum()))
        found = balance.bring_back(shares, sum(given, []), collected)
        expected = [(p, sample) for p in PROMPTS_OF_RANKS[world.rank] for sample in range(samples_of(p))]
        wrong += len(expected) != len(found.lengths)
        for row, (prompt, sample) in enumerate(expected):
            right = response(prompt, sample)
            length = found.lengths[row]
            wrong += found.token_ids[row, :length].tolist() != right
            wrong += found.logprobs[row, :length].tolist() != (-np.array(right, np.float32) / 7).tolist()
            wrong += bool(found.finished[row]) != (sample == 0)
    found_out = {"tokens": tokens, "wrong": wrong, "waits": waits(balance, world.rank)}
    (Path(sys.argv[1]) / f"rank{world.rank}.json").write_text(json.dumps(found_out))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
