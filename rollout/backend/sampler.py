"""Counter-based sampling on the CPU: a token depends on its request's seed and its position, on nothing else.

vLLM's CPU sampler draws a seed a row from torch's global generator in every step, which is the trainer's. Its
generators of single requests advance with every step that touches the request, chunks of a prompt included (and there
it raises, since CPU generators have no offset to set back). Here a row's randomness is a pure function of (seed,
position): the same noise whatever the batch, the schedule, a preemption or the rank, and no generator is read or
moved.
"""

from copy import copy
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

# Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (OOPSLA 2014), the mix of SplitMix64.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


def step_seeds(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One seed a row for one step: SplitMix64 of the request's seed, `positions` draws on.

    Args:
        seeds: (rows,) uint64, of the requests.
        positions: (rows,) of the token to be sampled, in its sequence.

    Returns:
        (rows,) int64, at least 0.

    >>> step_seeds(np.array([1, 1, 2], np.uint64), np.array([5, 6, 5])).tolist()
    [7036458801432265024, 8092113344071933522, 3197026156266379609]
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        state = seeds + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA
        state = (state ^ (state >> np.uint64(30))) * MIX_1
        state = (state ^ (state >> np.uint64(27))) * MIX_2
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


class CounterSampler:
    """Takes the place of vLLM's top-k, top-p and random sampling step in a CPU model runner.

    Used on the execute thread alone.

    Args:
        runner: vLLM's CPUModelRunner, warmed up.
    """

    def __init__(self, runner: Any) -> None:
        self._batch = runner.input_batch
        self._seeds: dict[str, int] = {}
        runner.sampler.topk_topp_sampler.forward = self.sample

    def admit(self, scheduler_output: SchedulerOutput) -> None:
        """Take the new requests' seeds over, so that the runner makes no generators, and forget the finished ones'."""
        for request_id in scheduler_output.finished_req_ids:
            self._seeds.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            if request.sampling_params is not None:
                self._seeds[request.req_id] = request.sampling_params.seed
                request.sampling_params = copy(request.sampling_params)
                request.sampling_params.seed = None

    def sample(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one token a row; the log-probs are those of the distribution drawn from.

        Args:
            logits: (rows, vocabulary) float32, divided by the temperature.
            generators: empty; kept for the signature it stands in for.
            k: (rows,) or None, of top-k.
            p: (rows,) or None, of top-p.

        Returns:
            Token ids (rows,) int64; log-probs (rows, vocabulary) float32.
        """
        assert not generators
        logits = apply_top_k_top_p(logits, k, p)
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        tokens = torch.ops._C.fused_gumbel_argmax(logits.float(), torch.from_numpy(self._row_seeds(len(logits))))
        return tokens, logprobs

    def _row_seeds(self, num_rows: int) -> np.ndarray:
        batch = self._batch
        assert num_rows == batch.num_reqs, (num_rows, batch.num_reqs)
        seeds = np.array([self._seeds[request_id] for request_id in batch.req_ids], np.uint64)
        return step_seeds(seeds, batch.num_tokens_no_spec[:num_rows])
