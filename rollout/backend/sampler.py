"""Sampling on the CPU: from shards of the vocabulary where the request allows it, counter-based in any case.

vLLM's CPU sampler gathers the whole vocabulary on every rank, samples it whole, makes a second pass for the log-prob,
and draws a seed a row from torch's global generator in every step, which is the trainer's. Its generators of single
requests advance with every step that touches the request, chunks of a prompt included (and there it raises, since CPU
generators have no offset to set back).

Here a row's randomness is a pure function of (seed, position), and no generator is read or moved. The plain setting of
reinforcement learning, temperature and the sampled token's log-prob, is sampled where the logits are, in shards
(rollout/sampling.py). What needs the whole row (top-k, top-p, min-p, penalties, grammars, the log-probs of other
tokens) takes vLLM's own path over the gathered logits, with counter-based noise.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from rollout.backend.head import StreamedLogits, head_library, logits_of
from rollout.sampling import BLOCK, Logits, ShardLogits, block_log_masses, candidates, combine, in_tiles, step_seeds


class RequestSeeds:
    """The random streams of the requests in a model runner's batch.

    Args:
        runner: vLLM's CPUModelRunner.
    """

    def __init__(self, runner: Any) -> None:
        self._batch = runner.input_batch
        self._seeds: dict[str, int] = {}
        self._rows: list[str] = []
        self._seeds_of_rows = np.zeros(0, np.uint64)

    def admit(self, scheduler_output: SchedulerOutput) -> None:
        """Take the new requests' seeds over, so that the runner makes no generators, and forget the finished ones'."""
        for request_id in scheduler_output.finished_req_ids:
            self._seeds.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            if request.sampling_params is not None:
                self._seeds[request.req_id] = request.sampling_params.seed
                request.sampling_params = copy(request.sampling_params)
                request.sampling_params.seed = None
        self._rows = []  # an id may have come back with another seed

    def of_step(self, num_rows: int) -> np.ndarray:
        """(rows,) int64: a seed for each row's next token."""
        batch = self._batch
        assert num_rows == batch.num_reqs, (num_rows, batch.num_reqs)
        if self._rows != batch.req_ids:
            self._rows = list(batch.req_ids)
            self._seeds_of_rows = np.array([self._seeds[request_id] for request_id in self._rows], np.uint64)
        return step_seeds(self._seeds_of_rows, batch.num_tokens_no_spec[:num_rows])


class GatheredSampler:
    """Takes the place of vLLM's top-k, top-p and random sampling step, over the whole vocabulary.

    Args:
        runner: vLLM's CPUModelRunner, warmed up.
        seeds: of its requests.
    """

    def __init__(self, runner: Any, seeds: RequestSeeds) -> None:
        self._seeds = seeds
        runner.sampler.topk_topp_sampler.forward = self.sample

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
        seeds = torch.from_numpy(self._seeds.of_step(len(logits)))
        return torch.ops._C.fused_gumbel_argmax(logits.float(), seeds), logprobs


class ShardedSampler:
    """Takes the place of the gathering of logits and of the sampler, for batches in which every request is plain.

    Made by `shard_sampling`; used on the execute thread alone.

    Args:
        runner: vLLM's CPUModelRunner, warmed up.
        seeds: of its requests.
        token_ranks: True if log-probs must come with the token's rank in the vocabulary, which takes the whole row.
        compiled: True to sum the blocks in a kernel compiled by torch, where kernels/head.cpp does not serve.
    """

    def __init__(self, runner: Any, seeds: RequestSeeds, token_ranks: bool, compiled: bool) -> None:
        model = runner.get_model()
        self._seeds = seeds
        self._processor, self._gathered = model.logits_processor, runner.sampler
        self._gather = self._processor._gather_logits
        self._ranks = get_tensor_model_parallel_world_size()
        indices = model.lm_head.shard_indices
        self._start, self._size = indices.org_vocab_start_index, indices.num_org_elements
        self._token_ranks = token_ranks
        self._special: set[str] = set()
        self._logits: ShardLogits | None = None
        self._library = head_library(model.lm_head.weight, self._processor.head_dtype)
        self._masses_of: Callable[..., torch.Tensor] = in_tiles
        if compiled and self._library is None:
            self._masses_of = torch.compile(block_log_masses, dynamic=True)
            self._compile(model.lm_head.weight)
        self._processor._get_logits = self.get_logits
        runner.sampler = self.sample

    @property
    def streams(self) -> bool:
        """True if kernels/head.cpp serves the plain batches."""
        return self._library is not None

    def admit(self, scheduler_output: SchedulerOutput) -> None:
        """Note which of the requests need the whole row."""
        self._special.difference_update(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            if params is None or not is_plain(params) or (self._token_ranks and params.logprobs is not None):
                self._special.add(request.req_id)

    def get_logits(
        self,
        hidden_states: torch.Tensor,
        lm_head: torch.nn.Module,
        embedding_bias: torch.Tensor | None,
        skip_gather: bool = False,
    ) -> torch.Tensor:
        """Stands in for LogitsProcessor._get_logits: the shard's logits if all requests are plain, else the gathered.

        Returns:
            (rows, any) of the model's dtype, which only `sample` can read; or (rows, vocabulary) float32.
        """
        assert isinstance(lm_head.weight, torch.Tensor)
        self._logits = None
        if not self._special and embedding_bias is None and not skip_gather:
            self._logits = self._shard_logits(hidden_states, lm_head.weight)
            return hidden_states
        full = logits_of(hidden_states, lm_head.weight, self._processor.head_dtype).float()
        if embedding_bias is not None:
            full += embedding_bias.float()
        if skip_gather:
            return full
        if self._ranks > 1:
            full = self._gather(full)
        return full[..., : self._processor.org_vocab_size]

    def _shard_logits(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> ShardLogits:
        if self._library is not None:
            return StreamedLogits(self._library, hidden_states.contiguous(), weight, self._size)
        high_low = logits_of(hidden_states, weight, self._processor.head_dtype)
        return Logits(high_low.high, high_low.low, self._size, self._masses_of)

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        """Stands in for vLLM's Sampler: one token a row, and its log-prob.

        Args:
            logits: (rows, vocabulary) of any floating dtype; of its values only the gathered path reads any.

        Returns:
            Token ids (rows, 1) int32, and log-probs (rows, 1) float32 where they were asked for.
        """
        shard, self._logits = self._logits, None
        if shard is None:
            return self._gathered(logits=logits, sampling_metadata=sampling_metadata)
        rows = len(logits)
        temperature = sampling_metadata.temperature
        if temperature is None or sampling_metadata.all_greedy:
            temperature = torch.zeros(rows)
        ours = candidates(shard, self._start, temperature[:rows], self._seeds.of_step(rows))
        if self._ranks > 1:
            ours = tensor_model_parallel_all_gather(ours, dim=0)
        tokens, logprobs = combine(ours.view(self._ranks, rows, 4))
        ids = tokens.int().unsqueeze(-1)
        of_sampled = LogprobsTensors(ids, logprobs.unsqueeze(-1), torch.zeros(rows, dtype=torch.int32))
        return SamplerOutput(ids, None if sampling_metadata.max_num_logprobs is None else of_sampled)

    def _compile(self, weight: torch.Tensor) -> None:
        """Compile now, not within the first phase."""
        width = -(-self._size // BLOCK) * BLOCK
        for rows in (2, 3):
            high = torch.zeros(rows, width, dtype=weight.dtype)
            split = self._processor.head_dtype == torch.float32 and weight.dtype != torch.float32
            self._masses_of(high, high.clone() if split else None, torch.ones(rows))


def shard_sampling(runner: Any, seeds: RequestSeeds, token_ranks: bool, compiled: bool) -> ShardedSampler | None:
    """A ShardedSampler for the runner, or None for a model whose head is not the plain product that it can replace."""
    model = runner.get_model()
    processor, lm_head = getattr(model, "logits_processor", None), getattr(model, "lm_head", None)
    if not isinstance(processor, LogitsProcessor) or processor.soft_cap is not None or processor.scale != 1.0:
        return None
    if lm_head is None or not isinstance(getattr(lm_head, "quant_method", None), UnquantizedEmbeddingMethod):
        return None
    if lm_head.shard_indices.num_added_elements or runner.lora_config or runner.speculative_config:
        return None
    if processor.logits_as_input or runner.model_config.logits_processors or lm_head.weight.is_cuda:
        return None
    return ShardedSampler(runner, seeds, token_ranks, compiled)


def is_plain(params: SamplingParams) -> bool:
    """True if temperature is all that shapes the distribution, and at most the sampled token's log-prob is wanted."""
    unshaped = (
        params.top_k in (0, -1)
        and params.top_p == 1.0
        and params.min_p == params.presence_penalty == params.frequency_penalty == 0.0
        and params.repetition_penalty == 1.0
        and params.min_tokens == 0
    )
    constraints = (
        params.logit_bias,
        params.bad_words,
        params.allowed_token_ids,
        params.structured_outputs,
        params.thinking_token_budget,
        params.watermarking,
        params.trace_decode_token_ids,
        params.extra_args,
    )
    more_logprobs = (params.logprobs, params.prompt_logprobs, params.prompt_logprob_token_ids, params.logprob_token_ids)
    return unshaped and not any(constraints) and not any(more_logprobs) and params.prompt_logprobs is None
