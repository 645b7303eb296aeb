"""One prefill for all samples of a prompt.

vLLM's prefix cache shares whole blocks only: of a prompt shorter than a block (128 tokens by default on the CPU, at
least 32) nothing, and of a longer one not the last part. Here the first sample of a prompt, its leader, is admitted
alone. When its prompt has been scheduled, the others follow: they share its whole blocks, get a copy of the block
that the prompt ends in (vLLM's own copy-on-write, made for hybrid models), and compute the prompt's last token alone,
whose logits each needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request


@dataclass
class Group:
    """The samples of one prompt, its leader apart.

    Attributes:
        leader: the sample that is prefilled.
        siblings: the others.
        num_waiting: siblings that do not run yet.
        blocks: of the prompt, held from the leader's prefill until the last sibling runs, even if the leader has ended.
    """

    leader: Request
    siblings: list[Request]
    num_waiting: int
    blocks: Sequence[KVCacheBlock] = ()


class GroupAdmission:
    """Admits a phase's requests to the scheduler, a group's leader first.

    Without prefix caching, or with KV-cache groups other than one of full attention, every request is admitted at once
    and prefilled by itself.

    Args:
        scheduler: of the engine core. Its prefix-cache lookup is wrapped.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        managers = self._manager.coordinator.single_type_managers
        self._can_share = self._manager.enable_caching and [*map(type, managers)] == [FullAttentionManager]
        self._leading: list[Group] = []
        self._following: dict[str, Group] = {}
        self._blocks_of: dict[str, list[KVCacheBlock]] = managers[0].req_to_blocks if managers else {}
        if self._can_share:
            self._block_size = managers[0].block_size
            self._stock_lookup = self._manager.get_computed_blocks
            self._manager.get_computed_blocks = self._computed_blocks

    def admit(self, requests: Sequence[Request], sizes: Sequence[int]) -> None:
        """Hand the requests to the scheduler, now or once their leader is prefilled.

        Args:
            requests: a whole phase's; samples of one prompt stand together.
            sizes: samples of each prompt, in order.
        """
        start = 0
        for size in sizes:
            leader, *siblings = requests[start : start + size]
            start += size
            self._scheduler.add_request(leader)
            if siblings and self._can_share:
                self._leading.append(Group(leader, siblings, len(siblings)))
                continue
            for sibling in siblings:
                self._scheduler.add_request(sibling)

    def after_schedule(self) -> None:
        """To be called after each step's scheduling, before its output is taken."""
        if self._leading:
            # A step is run in its place in the queue: whoever is scheduled from now on may copy what this one computes.
            ready = [group for group in self._leading if self._is_prefilled(group.leader)]
            for group in ready:
                self._follow(group)
            siblings = [sibling for group in ready for sibling in group.siblings]
            for sibling in siblings:
                self._scheduler.add_request(sibling)
            # To the front, or leaders would take all places and the blocks held for their siblings stay unused.
            self._scheduler.waiting.rotate(len(siblings))
            self._leading = [group for group in self._leading if not group.blocks]
        if self._following:
            # With nothing running, held blocks may be what keeps the next sibling out: it is prefilled by itself then.
            stuck = not self._scheduler.running
            self._release([request_id for request_id in self._following if stuck or request_id in self._blocks_of])

    def _is_prefilled(self, leader: Request) -> bool:
        return leader.num_computed_tokens >= leader.num_prompt_tokens

    def _follow(self, group: Group) -> None:
        """Hold the prompt's blocks for the siblings: all but the last token, which each computes itself."""
        shared = group.leader.num_prompt_tokens - 1
        num_blocks = max(1, -(-shared // self._block_size))
        group.blocks = tuple(self._blocks_of[group.leader.request_id][:num_blocks])
        self._manager.block_pool.touch(group.blocks)
        self._following.update((sibling.request_id, group) for sibling in group.siblings)

    def _release(self, running: list[str]) -> None:
        """Forget siblings, which have blocks of their own now; let go of a group's blocks with its last one."""
        for request_id in running:
            group = self._following.pop(request_id)
            group.num_waiting -= 1
            if not group.num_waiting:
                # From the end, as vLLM frees: the beginning of a prompt is the likelier to be hit again.
                self._manager.block_pool.free_blocks(reversed(group.blocks))

    def _computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """Stands in for KVCacheManager.get_computed_blocks: a sibling has all of its prompt but the last token."""
        group = self._following.get(request.request_id)
        shared = request.num_prompt_tokens - 1
        if group is None or shared == 0:
            return self._stock_lookup(request)
        return self._manager.create_kv_cache_blocks((list(group.blocks),)), shared, 0
