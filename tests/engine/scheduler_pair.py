"""Two vLLM schedulers on one workload without a model: vLLM's own and ours, compared after every step."""

import dataclasses
import zlib
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 40
EOS = 7


@dataclass(frozen=True)
class Setup:
    """How both schedulers are built. Blocks hold `block_size` tokens; vLLM keeps one of them for itself."""

    asynchronous: bool = True
    v2_runner: bool = False
    block_size: int = 4
    num_blocks: int = 64
    prefix_caching: bool = True
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_model_len: int = 64
    log_stats: bool = False
    watermark: float = 0.0
    whole_prompt_must_fit: bool = True


@dataclass(frozen=True)
class Spec:
    """One request: prompts and tokens of the same `family` are equal."""

    request_id: str
    prompt: tuple[int, ...]
    family: int
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    eos: bool = True
    min_tokens: int = 0
    logprobs: bool = True
    repetition_detection: bool = False


def base_config(model: Path) -> Any:
    """vLLM's configuration for a model folder, to be copied by `make_scheduler`: it takes a while to make."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), max_model_len=64, skip_tokenizer_init=True).create_engine_config()


def make_scheduler(cls: type, config: Any, setup: Setup) -> Any:
    """A scheduler of class `cls` with a KV cache of its own."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = copy(config)
    for name in ("model_config", "scheduler_config", "cache_config"):
        setattr(config, name, copy(getattr(config, name)))
    config.model_config.max_model_len = setup.max_model_len
    config.scheduler_config.async_scheduling = setup.asynchronous
    config.scheduler_config.max_num_seqs = setup.max_num_seqs
    config.scheduler_config.max_num_batched_tokens = setup.max_num_batched_tokens
    config.scheduler_config.max_num_scheduled_tokens = None
    config.scheduler_config.watermark = setup.watermark
    config.scheduler_config.scheduler_reserve_full_isl = setup.whole_prompt_must_fit
    config.cache_config.block_size = setup.block_size
    config.cache_config.enable_prefix_caching = setup.prefix_caching
    config.cache_config.num_gpu_blocks = setup.num_blocks
    attention = FullAttentionSpec(block_size=setup.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(setup.num_blocks, [], [KVCacheGroupSpec(["layer"], attention)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=setup.block_size,
        log_stats=setup.log_stats,
    )
    scheduler.use_v2_model_runner = setup.v2_runner  # the CPU build would never choose it
    return scheduler


def make_request(spec: Spec, setup: Setup) -> Any:
    """vLLM's request for a Spec, with block hashes where the prefix cache is on."""
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    repetition = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=1, min_count=3)
    params = SamplingParams(
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        stop_token_ids=list(spec.stop_token_ids),
        logprobs=0 if spec.logprobs else None,
        detokenize=False,
        repetition_detection=repetition if spec.repetition_detection else None,
    )
    params._eos_token_id = EOS if spec.eos else None
    init_none_hash(_hash)
    return Request(
        request_id=spec.request_id,
        prompt_token_ids=list(spec.prompt),
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        block_hasher=get_request_block_hasher(setup.block_size, _hash) if setup.prefix_caching else None,
    )


def _hash(value: Any) -> bytes:
    return zlib.crc32(repr(value).encode()).to_bytes(4, "big")  # equal for equal prefixes, in a readable length


class FakeRunner:
    """A model runner without a model: the token at a position depends on the request's family and the position.

    Rows stand in an order of its own, as in vLLM's persistent batch, and it knows as much about the requests as a
    real one: what the scheduler sent.
    """

    def __init__(self, families: dict[str, int], arrays: bool) -> None:
        self.families = families
        self.arrays = arrays
        self._lengths: dict[str, int] = {}
        self._rows: list[str] = []

    def run(self, scheduled: Any, shuffle: np.random.Generator | None) -> Any:
        """The output of one step; `shuffle` puts the rows into a new order."""
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        from rollout.backend.outputs import SampledTokens

        self._admit(scheduled)
        counts = scheduled.num_scheduled_tokens
        rows = [each for each in self._rows if each in counts] + [each for each in counts if each not in self._rows]
        if shuffle is not None:
            shuffle.shuffle(rows)
        self._rows = rows
        tokens, valid = self._sample(scheduled, rows)
        logprobs = -(tokens[:, None] + np.arange(1, 3, dtype=np.float32) / 8) / 100
        sampled: Any = [[int(token)] if ok else [] for token, ok in zip(tokens, valid, strict=True)]
        if self.arrays:
            sampled = SampledTokens(tokens, None if valid.all() else valid)
        lists = LogprobsLists(tokens[:, None], logprobs.astype(np.float32), np.zeros_like(tokens))
        return ModelRunnerOutput(rows.copy(), {each: row for row, each in enumerate(rows)}, sampled, lists)

    def _admit(self, scheduled: Any) -> None:
        for new in scheduled.scheduled_new_reqs:
            self._lengths[new.req_id] = len(new.prefill_token_ids or new.prompt_token_ids)
        for request_id, token_ids in scheduled.scheduled_cached_reqs.all_token_ids.items():
            self._lengths[request_id] = len(token_ids)

    def _sample(self, scheduled: Any, rows: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        cached = scheduled.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        tokens, valid = np.zeros(len(rows), np.int32), np.zeros(len(rows), bool)
        for row, request_id in enumerate(rows):
            end = computed[request_id] + scheduled.num_scheduled_tokens[request_id]
            assert end <= self._lengths[request_id], "the scheduler is ahead of the tokens"
            if end == self._lengths[request_id]:
                valid[row] = True
                tokens[row] = token_at(self.families[request_id], end)
                self._lengths[request_id] += 1
        return tokens, valid


def token_at(family: int, position: int) -> int:
    """The token that the fake model says at a position; family 0 repeats itself."""
    position = position % 2 if family == 0 else position
    return zlib.crc32(f"{family}/{position}".encode()) % VOCABULARY


class Side:
    """One scheduler, its runner, and the steps under way between them."""

    def __init__(self, scheduler: Any, runner: FakeRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.in_flight: deque[tuple[Any, Any]] = deque()

    def schedule(self, shuffle_seed: int | None, throttle_prefills: bool = False) -> Any:
        scheduled = self.scheduler.schedule(throttle_prefills)
        shuffle = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
        self.in_flight.append((scheduled, self.runner.run(scheduled, shuffle)))
        return scheduled

    def take(self, through_vllm: bool = False) -> tuple[list[tuple[str, int, float]], list[tuple[str, int]]]:
        """(request, token, log-prob) of each token, and (request, reason) of each end, in the scheduler's order.

        Args:
            through_vllm: True takes vLLM's own method even where there is ours.
        """
        scheduled, output = self.in_flight.popleft()
        if hasattr(self.scheduler, "take_output") and not through_vllm:
            update = self.scheduler.take_output(scheduled, output)
            assert update.token_ids.dtype == np.int32 and update.logprobs.dtype == np.float32
            arrays = (update.token_ids.tolist(), update.logprobs.tolist())
            return list(zip(update.request_ids, *arrays, strict=True)), [
                (update.request_ids[index], reason) for index, reason in update.finished
            ]
        tokens, finished = [], []
        for outputs in self.scheduler.update_from_output(scheduled, output).values():
            for each in outputs.outputs:
                logprob = float("nan") if each.new_logprobs is None else float(each.new_logprobs.logprobs[0, 0])
                tokens += [(each.request_id, token, logprob) for token in each.new_token_ids]
                if each.finish_reason is not None:
                    finished.append((each.request_id, int(each.finish_reason)))
        return tokens, finished


def is_decode_step(scheduled: Any) -> bool:
    """True if every sequence of the step got one token to decode, and none was preempted or came back."""
    cached = scheduled.scheduled_cached_reqs
    return (
        scheduled.total_num_scheduled_tokens == len(cached.req_ids) > 0
        and not scheduled.scheduled_new_reqs
        and not cached.resumed_req_ids
        and not scheduled.preempted_req_ids
        and min(cached.num_output_tokens) > 0
    )


def fields_of(scheduled: Any) -> dict[str, Any]:
    """A SchedulerOutput's fields, those that our subclass adds left out."""
    from vllm.v1.core.sched.output import SchedulerOutput

    fields = {each.name: getattr(scheduled, each.name) for each in dataclasses.fields(SchedulerOutput)}
    cached = fields["scheduled_cached_reqs"]
    # In this order, too: the runner walks over it.
    fields["order"] = list(scheduled.num_scheduled_tokens.items())
    fields["types"] = {type(each) for each in cached.num_computed_tokens + cached.num_output_tokens}
    # Parameters are objects of each side's own; their values are the Spec's.
    fields["scheduled_new_reqs"] = [
        dataclasses.replace(new, sampling_params=None) for new in fields["scheduled_new_reqs"]
    ]
    return fields


def queues_of(scheduler: Any) -> dict[str, Any]:
    """What a scheduler holds beside the requests' own fields."""
    return {
        "running": [request.request_id for request in scheduler.running],
        "waiting": [request.request_id for request in scheduler.waiting],
        "requests": list(scheduler.requests),
        "finished_req_ids": scheduler.finished_req_ids,
        "reset_preempted_req_ids": scheduler.reset_preempted_req_ids,
        "prev_step_scheduled_req_ids": scheduler.prev_step_scheduled_req_ids,
        "current_step": scheduler.current_step,
        "prefill_capacity_bound": scheduler.prefill_capacity_bound,
        "counts": scheduler.get_request_counts(),
        "unfinished": scheduler.get_num_unfinished_requests(),
        "has_requests": scheduler.has_requests(),
    }


def allocator_of(scheduler: Any) -> dict[str, Any]:
    """The whole state of a scheduler's block allocator and prefix cache."""
    manager = scheduler.kv_cache_manager
    [group] = manager.coordinator.single_type_managers
    pool = manager.block_pool
    cached = pool.cached_block_hash_to_block._cache
    return {
        "free": [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
        "references": [block.ref_cnt for block in pool.blocks],
        "hashes": [(block.block_hash, block.block_hash_num_tokens) for block in pool.blocks],
        "cached": {key: _block_ids(value) for key, value in cached.items()},
        "blocks": {request_id: _block_ids(blocks) for request_id, blocks in group.req_to_blocks.items()},
        "num_cached": dict(group.num_cached_block),
        "new_block_ids": list(group.new_block_ids),
        "usage": manager.usage,
    }


def _block_ids(blocks: Any) -> list[int]:
    if isinstance(blocks, dict):  # several blocks with one hash, in the order of their registration
        return [block.block_id for block in blocks.values()]
    return [block.block_id for block in (blocks if isinstance(blocks, list) else [blocks])]


def requests_of(scheduler: Any) -> dict[str, dict[str, Any]]:
    """Every field of every request that the scheduler knows."""
    own = ("sampling_params", "_block_hasher", "prefill_stats", "output_token_ids", "all_token_ids")
    return {
        request_id: {name: value for name, value in vars(request).items() if name not in own}
        | {"has_prefill_stats": request.prefill_stats is not None}
        for request_id, request in scheduler.requests.items()
    }
