"""RolloutEngine: vLLM inside the trainer's own processes. Generate, sync weights, close."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch import nn

from rollout.agreement import EXPLANATION_TIMEOUT_S, Agreement
from rollout.balance import Balance
from rollout.config import RolloutConfig, SamplingConfig
from rollout.driver import Collected, Phase, drive
from rollout.failure import watched
from rollout.fence import Fence, no_backward
from rollout.isolation import preserved_trainer_state
from rollout.throughput import PhaseTimeline, phase_metrics
from rollout.types import Prompt, RolloutBatch
from rollout.weights import SyncReport, empty_prefix_cache, named_weights, sync_policy
from rollout.world import World, check_machines, init_world, machines_of_ranks, tensor_parallel_group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSYNCED = -1
"""The version of rollouts made with the weights that the engine was built from."""


class RolloutEngine:
    """Rollouts by vLLM, in the ranks of a job started by torchrun (or in one plain process).

    Every rank builds one, and calls the same methods in the same order. The ranks of a tensor-parallel group generate
    together; each passes its own prompts and gets its own share back. The default process group is the trainer's: it
    is used, made where there is none, and never destroyed.

    Args:
        model: a local folder or a hub name.
        config: the same on every rank.

    Raises:
        ValueError: if the tensor-parallel size does not divide the world or the model's heads, a group lies on several
            machines, or the ranks of a group were given different models or configs.

    Example, as a script for `torchrun --nproc_per_node=2`:

        with RolloutEngine("models/smollm2-135m-tp2", RolloutConfig(tensor_parallel_size=2)) as engine:
            batch = engine.generate(["The capital of France is"], SamplingConfig(max_tokens=8))
            print(engine.tokenizer.decode(batch[0].response_ids))
    """

    def __init__(self, model: str, config: RolloutConfig | None = None) -> None:
        self.model = model
        self.config = config or RolloutConfig()
        self.world: World = init_world()
        self.tensor_parallel_size = self.config.tensor_parallel_size or self.world.size
        self._group = tensor_parallel_group(self.world, self.tensor_parallel_size)
        check_machines(self.config.tensor_parallel_size, machines_of_ranks())
        self._balance: Balance | None = None
        self._phase: Phase | None = None
        self._collected: Collected | None = None
        self._num_phases = 0
        self._version = UNSYNCED
        self._synced: Callable[[], nn.Module | None] = lambda: None  # a weak reference
        self._metrics: dict[str, float] = {}
        with ExitStack() as watching:
            self._watch = watching.enter_context(watched(stall_timeout_s=self.config.stall_timeout_s))
            self._fence = Fence(self._watch, self.world.size)
            self._build()
            self._watching = watching.pop_all()

    @property
    def version(self) -> int:
        """Of the weights that the engine holds: as given to the last `sync_weights`; -1 before the first."""
        return self._version

    @property
    def metrics(self) -> dict[str, float]:
        """The rollout/* figures of the last `generate` of this tensor-parallel group (docs/metrics.md)."""
        return dict(self._metrics)

    @property
    def timeline(self) -> PhaseTimeline:
        """When each step of the last `generate` was scheduled, run, waited for and taken in, on this rank."""
        return self._phase.timeline if self._phase else PhaseTimeline()

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)

    def digest(self) -> str:
        """Of all tokens and log-probs of the last `generate`, the whole group's: equal on each of its ranks.

        Raises:
            RuntimeError: if there was none, or it was interrupted.
        """
        if self._collected is None:
            raise RuntimeError(f"nothing was generated, and the rollout engine is {self._fence.state}: call generate")
        return self._collected.digest()

    def describe(self) -> dict[str, Any]:
        """What really runs: scheduler, executor and model runner classes, queue depth."""
        return self._core.describe()

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig | None = None, *, seed: int | None = None
    ) -> RolloutBatch:
        """Sample `sampling.n` responses to each of this rank's prompts; all ranks of the group call it together.

        With `config.balance` and several replicas all ranks of the job do, and what is said of the group holds for it.

        Args:
            prompts: this rank's own, texts or token ids; may be fewer or more than the other ranks'.
            sampling: the same on every rank of the group.
            seed: of this call's random streams, together with `config.seed`; the same on every rank. By default the
                number of calls so far, so that each call draws afresh and a whole job repeats.

        Returns:
            This rank's share: sample j of prompt i in row i * n + j.

        Raises:
            ValueError: if a prompt is empty or leaves no room for `max_tokens` within `max_model_len`, or if the ranks
                were given different sampling or seeds.
            RanksDisagree: if the ranks of the group scheduled or sampled different things (rollout/agreement.py).
            RuntimeError: if the engine is closed, busy or broken by an earlier error.
        """
        sampling = sampling or SamplingConfig()
        seed = self._num_phases if seed is None else seed
        with self._fence.one_caller():
            ours = [self._token_ids(prompt) for prompt in prompts]
            prompts_of_ranks = self._share(ours, sampling, seed)
            self._check_prompts(prompts_of_ranks, sampling)
            with self._fence.busy("generating"), no_backward(self._synced()):
                answer = self._answer_own if self._balance is None else self._answer_balanced
                collected, rows = answer(prompts_of_ranks, sampling, seed)
            self._num_phases += 1
        return pack(ours, sampling.n, collected, rows, self._version)

    def sync_weights(self, policy: nn.Module, version: int) -> SyncReport:
        """Copy the policy's weights into the engine; all ranks call it together, between calls of `generate`.

        Args:
            policy: a Hugging Face causal language model of the engine's architecture, plain, in DDP or in FSDP2's shards
                (`fully_shard`); the same on every rank.
            version: recorded by every rollout made from now on; at least 0.

        Raises:
            ValueError: if the policy lacks a parameter that the engine has, or the version is negative.
            RuntimeError: if the engine is closed, busy or broken by an earlier error.
        """
        if version < 0:
            raise ValueError(f"version is {version}; it must be at least 0")
        with self._fence.one_caller(), self._fence.busy("syncing weights"):
            report = sync_policy(self._core, policy, version)
        self._version, self._synced = version, weakref.ref(policy)
        return report

    def check_weights(self, policy: nn.Module) -> None:
        """Compare all that the engine holds with the policy, bit for bit; each sync by itself looks at a few layers.

        Args:
            policy: as given to the last `sync_weights`, and not changed since.

        Raises:
            StaleWeights: names the first parameter that differs.
            RuntimeError: if nothing was synced yet, or not by a plan.
        """
        with self._fence.one_caller():
            if not self._core.executor.sync_layers():
                raise RuntimeError("there is no plan to compare by: sync first, and see SyncReport.planned")
            with self._fence.busy("checking weights"):
                self._core.executor.check_policy_weights(dict(named_weights(policy)))

    @contextmanager
    def awake(self) -> Iterator["RolloutEngine"]:
        """The rollout phase of a training step: sync and generate inside, train outside, where the engine sleeps."""
        self._fence.check()
        yield self
        self.sleep()

    def sleep(self) -> int:
        """Give back the memory that only generation needs; the next `generate` takes it again, by itself.

        On the CPU: the pages of the KV cache. On CUDA nothing is given back yet.

        Returns:
            The bytes that this rank gave back.

        Raises:
            RuntimeError: if the engine is closed, busy or broken by an earlier error.
        """
        with self._fence.one_caller(), self._fence.busy("falling asleep"):
            empty_prefix_cache(self._core)
            return self._core.executor.release_kv_cache()

    def close(self) -> None:
        """Stop the execute thread and free the engine. The process group stays as it is. Safe to call twice.

        Raises:
            RuntimeError: if another thread is in a call.
            TimeoutError: if the execute thread does not end within `config.shutdown_timeout_s`.
        """
        if self._fence.close():
            try:
                self._core.close(self.config.shutdown_timeout_s)
            finally:
                self._watching.close()

    def __enter__(self) -> "RolloutEngine":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        if error is not None:
            # Before anything that waits for the other ranks, which may wait for this one.
            self._watch.report(error)
        self.close()

    def _build(self) -> None:
        last_words = tensor_parallel_group(self.world, self.tensor_parallel_size, EXPLANATION_TIMEOUT_S)
        self._agreement = Agreement(self._group, last_words)
        if self.config.balance and self.world.size > self.tensor_parallel_size:
            self._balance = Balance(tensor_parallel_group(self.world, self.world.size), self.tensor_parallel_size)
        self._check_same_config()
        with preserved_trainer_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own, of torch's
            # Imported here: it takes seconds, which a config error must not; and it writes into the environment.
            from rollout.backend.core import build_core

            on_cuda = self.world.device.type == "cuda"
            self._core = build_core(self.model, self.tensor_parallel_size, self.config, on_cuda)

    def _answer_own(
        self, prompts_of_ranks: list[list[np.ndarray]], sampling: SamplingConfig, seed: int
    ) -> tuple[Collected, slice]:
        """The responses to the prompts of this replica, and which rows of them are this rank's."""
        prompts = [prompt for of_rank in prompts_of_ranks for prompt in of_rank]
        replica = self.world.rank // self.tensor_parallel_size
        # A stream of its own for each: two replicas' prompts of one number have nothing to do with each other.
        streams = np.random.SeedSequence((self.config.seed, seed), spawn_key=(replica,) if replica else ())
        collected = self._run(prompts, range(len(prompts)), sampling, streams)
        rank = dist.get_rank(self._group)
        before = sum(len(of_rank) for of_rank in prompts_of_ranks[:rank]) * sampling.n
        return collected, slice(before, before + len(prompts_of_ranks[rank]) * sampling.n)

    def _answer_balanced(
        self, prompts_of_ranks: list[list[np.ndarray]], sampling: SamplingConfig, seed: int
    ) -> tuple[Collected, slice]:
        """The responses to this rank's prompts, by whichever replicas, and which rows of them are this rank's: all.

        Prompts are numbered over the whole job, so that who answers one does not move its random numbers.
        """
        assert self._balance is not None
        prompts = [prompt for of_rank in prompts_of_ranks for prompt in of_rank]
        shares = self._balance.shares(prompts_of_ranks, sampling.n, sampling.max_tokens)
        numbers = shares.of_replicas[self.world.rank // self.tensor_parallel_size]
        own = [prompts[number] for number in numbers]
        answers = self._run(own, numbers, sampling, np.random.SeedSequence((self.config.seed, seed)))
        collected = self._balance.bring_back(shares, prompts_of_ranks, answers)
        return collected, slice(0, len(collected.lengths))

    def _run(
        self,
        prompts: Sequence[np.ndarray],
        numbers: Sequence[int],
        sampling: SamplingConfig,
        streams: np.random.SeedSequence,
    ) -> Collected:
        """All responses of this replica.

        Args:
            prompts: that it answers.
            numbers: of the prompts, by which their random streams are told apart.
            streams: the seed of all of them.
        """
        from rollout.backend.core import make_requests

        self._collected = None  # nothing of the last phase passes for this one's, should it be interrupted
        requests = make_requests(self._core, prompts, sampling, streams, numbers)
        collected = Collected.empty(len(requests), sampling.max_tokens)
        self._phase = Phase(PhaseTimeline())
        with preserved_trainer_state():
            drive(self._core, requests, sampling.n, collected, self._phase, self._agreement, self._watch.beat)
            self._agreement.finish()
        self._metrics = phase_metrics(
            self._phase.timeline,
            seconds=self._phase.seconds,
            num_sequences=len(requests),
            response_lengths=collected.lengths,
            finished=collected.finished,
            kv_cache_usage_peak=self._phase.peak_kv_cache_usage,
            preemptions=self._phase.preemptions,
        )
        self._collected = collected
        return collected

    def _token_ids(self, prompt: Prompt) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int32)

    def _share(self, ours: list[np.ndarray], sampling: SamplingConfig, seed: int) -> list[list[np.ndarray]]:
        """Every rank's prompts, in rank order, once all who generate together are known to ask for the same thing."""
        group, of_what = self._group, "tensor-parallel group"
        if self._balance is not None:
            group, of_what = self._balance.group, "job"
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (ours, sampling, seed), group=group)
        for rank, (_, theirs, their_seed) in enumerate(gathered):
            if (theirs, their_seed) != gathered[0][1:]:
                raise ValueError(
                    f"rank {rank} of the {of_what} generates with {theirs}, seed {their_seed}; "
                    f"rank 0 with {gathered[0][1]}, seed {gathered[0][2]}: pass the same on every rank"
                )
        return [prompts for prompts, _, _ in gathered]

    def _check_prompts(self, prompts_of_ranks: list[list[np.ndarray]], sampling: SamplingConfig) -> None:
        # Every rank checks every prompt, so that all of them raise together and none waits for the others.
        limit = self._core.max_model_len - sampling.max_tokens
        for rank, prompts in enumerate(prompts_of_ranks):
            for index, prompt in enumerate(prompts):
                if not 0 < len(prompt) <= limit:
                    raise ValueError(
                        f"prompt {index} of rank {rank} has {len(prompt)} tokens; between 1 and {limit} fit "
                        f"(rollout.max_model_len {self._core.max_model_len} less sampling.max_tokens "
                        f"{sampling.max_tokens}): shorten the prompt or raise rollout.max_model_len"
                    )

    def _check_same_config(self) -> None:
        everyones: list[Any] = [None] * self.tensor_parallel_size
        dist.all_gather_object(everyones, (self.model, self.config), group=self._group)
        for rank, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                raise ValueError(
                    f"rank {rank} of the tensor-parallel group builds its engine from {theirs}, rank 0 from "
                    f"{everyones[0]}: pass the same on every rank, the seed included"
                )


def pack(prompts: Sequence[np.ndarray], n: int, collected: Collected, rows: slice, version: int) -> RolloutBatch:
    """This rank's rows of the group's tokens, without padding."""
    lengths = collected.lengths[rows]
    valid = np.arange(collected.token_ids.shape[1]) < lengths[:, None]
    repeated = [prompt for prompt in prompts for _ in range(n)]
    return RolloutBatch(
        prompt_ids=np.concatenate(repeated) if repeated else np.zeros(0, np.int32),
        prompt_lengths=np.array([len(prompt) for prompt in repeated], np.int32),
        response_ids=collected.token_ids[rows][valid],
        response_lengths=lengths,
        logprobs=collected.logprobs[rows][valid],
        finished=collected.finished[rows],
        prompt_index=np.repeat(np.arange(len(prompts), dtype=np.int32), n),
        version=version,
    )
