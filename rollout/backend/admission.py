"""Whether the request that waits in front would be admitted, found out without trying.

With more sequences than the KV cache holds, requests wait for blocks while places are free. vLLM tries the first of
them at every step and admits it once its blocks fit into the free ones. In between, a step in which all that runs
decodes is steady all the same: here it is shown that vLLM would try in vain. The proof is one-sided, and takes nothing
over from earlier steps: where it fails, vLLM tries.
"""

from collections.abc import Iterable

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus


def looks_at_waiting(scheduler: Scheduler) -> bool:
    """True if vLLM would try to admit a waiting request: one waits, and a place is free."""
    num_running, num_waiting = scheduler.get_request_counts()
    return num_waiting > 0 and num_running + scheduler.num_waiting_for_streaming_input < scheduler.max_num_active_reqs


def first_in_line(scheduler: Scheduler) -> Request | None:
    """The request that vLLM would try, and no other after it; None if not just free blocks decide on that.

    Args:
        scheduler: one that `looks_at_waiting`.
    """
    if not scheduler.scheduler_reserve_full_isl or scheduler.kv_holding_waiting:
        return None  # the first chunk decides, whose length depends on the budget; another queue comes first
    request = scheduler.waiting.peek_request()
    # A request whose tokens of before its preemption are still to come is passed over, and the next one is tried.
    if (
        request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        or request.num_computed_tokens
        or request.num_stale_output_tokens
        or request.mm_features
    ):
        return None
    return request


def fits_anyway(manager: KVCacheManager, request: Request, num_running: int) -> bool:
    """True if there is room for the whole request even if each running sequence takes a block; False says nothing."""
    [group] = manager.coordinator.single_type_managers
    most = -(-request.num_tokens // group.block_size) + manager.watermark_blocks + num_running
    return most <= manager.block_pool.get_num_free_blocks()


def stays_out(manager: KVCacheManager, request: Request, num_free_blocks: int, due: Iterable[Request]) -> bool:
    """True if vLLM would not admit the waiting request after the running ones have got their blocks.

    It needs the blocks of its whole sequence but for those of them that are in use: a block in the prefix cache that
    nobody uses is a free one, and counts on both sides. So what the running requests do meanwhile matters twice. A
    block that becomes full may be one that the request is waiting for. And a cached block that is given to another
    sequence may have a twin in use, equal in its tokens, which vLLM did not see before.

    Args:
        manager: vLLM's, before the running requests get their blocks.
        request: from `first_in_line`; others are running.
        num_free_blocks: those left then.
        due: the running requests that get a block or register one in the prefix cache, with all of their tokens.
    """
    if num_free_blocks <= manager.watermark_blocks:
        return True  # whatever is cached, its last token needs a block
    if any(_registers_one_of(manager, each, request) for each in due):
        return False
    cached, num_cached_tokens, _ = manager.get_computed_blocks(request)
    num_tokens = min(request.num_tokens, manager.max_model_len)
    needed = manager.coordinator.get_num_blocks_to_allocate(
        request_id=request.request_id,
        num_tokens=num_tokens,
        new_computed_blocks=cached.blocks,
        num_encoder_tokens=0,
        total_computed_tokens=num_cached_tokens,
        num_local_computed_tokens=num_cached_tokens,
        num_tokens_main_model=num_tokens,
        apply_admission_cap=True,
    )
    twins = sum(_has_twin_in_use(manager, block) for block in cached.blocks[0])
    return needed - twins + manager.watermark_blocks > num_free_blocks


def _registers_one_of(manager: KVCacheManager, running: Request, waiting: Request) -> bool:
    """True if a block that `running` has yet to register is one of the waiting request's sequence, too."""
    [group] = manager.coordinator.single_type_managers
    if not group.enable_caching:
        return False
    # The hash of a block covers all before it: equal ones stand at equal places.
    start = group.num_cached_block.get(running.request_id, 0)
    pairs = zip(running.block_hashes[start:], waiting.block_hashes[start:], strict=False)
    return any(mine == theirs for mine, theirs in pairs)


def _has_twin_in_use(manager: KVCacheManager, block: KVCacheBlock) -> bool:
    """True if nobody uses this cached block, but another one with the same tokens is in use."""
    if block.ref_cnt:
        return False
    same = manager.block_pool.cached_block_hash_to_block._cache.get(block.block_hash)
    return isinstance(same, dict) and any(each.ref_cnt for each in same.values())
