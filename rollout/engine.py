"""RolloutEngine: vLLM inside the trainer's own processes. Generate, sync weights, close."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch import nn

from rollout.adapters import check_adapters
from rollout.agreement import EXPLANATION_TIMEOUT_S, Agreement
from rollout.balance import Balance
from rollout.config import RolloutConfig, SamplingConfig
from rollout.driver import Collected, Phase, drive
from rollout.failure import watched
from rollout.fence import Fence, no_backward
from rollout.isolation import preserved_trainer_state
from rollout.sampling import request_streams
from rollout.spans import record_phase, span
from rollout.throughput import PhaseTimeline, phase_metrics
from rollout.types import Asked, OnStep, Prompt, Rollout, RolloutBatch
from rollout.weights import SyncReport, empty_prefix_cache, named_weights, sync_policy
from rollout.world import (
    World,
    check_machines,
    check_tensor_parallel_size,
    gathered,
    init_world,
    machines_of_ranks,
    tensor_parallel_group,
)

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
            machines, or the ranks were given different models or configs.

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
        # Before any group is made: ranks that do not want the same ones would wait for each other there.
        check_same_config(self.model, self.config)
        check_tensor_parallel_size(self.tensor_parallel_size, self.world.size)
        check_machines(self.config.tensor_parallel_size, machines_of_ranks())
        self._phase: Phase | None = None
        self._collected: Collected | None = None
        self._num_phases = 0
        self._version = UNSYNCED
        self._weights_lost = False
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
        """What really runs: scheduler, executor and model runner classes, queue depth.

        Raises:
            RuntimeError: if the engine is closed; so do `max_model_len`, `everyones` and `any_rank`.
        """
        self._fence.check_open()
        return self._core.describe()

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its response together, at most."""
        self._fence.check_open()
        return self._core.max_model_len

    def everyones(self, value: Any) -> list[Any]:
        """Each rank's value, in rank order; a collective of the tensor-parallel group. Small values only: pickled."""
        self._fence.check_open()
        return gathered(value, self._group)

    def any_rank(self, value: bool) -> bool:
        """True if one of the ranks that generate together says so; a collective of these."""
        self._fence.check_open()
        return any(gathered(value, self._together))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig | None = None,
        *,
        seed: int | None = None,
        on_step: OnStep | None = None,
        samples: Sequence[int] | None = None,
        max_tokens: Sequence[int] | None = None,
        streams: Sequence[int | None] | None = None,
    ) -> RolloutBatch:
        """Sample `sampling.n` responses to each of this rank's prompts; all ranks of the group call it together.

        With `config.balance` and several replicas all ranks of the job do, and what is said of the group holds for it.

        Args:
            prompts: this rank's own, texts or token ids; may be fewer or more than the other ranks'.
            sampling: the same on every rank of the group.
            seed: of this call's random streams, together with `config.seed`; the same on every rank. By default the
                number of calls so far, so that each call draws afresh and a whole job repeats.
            on_step: called after each step with this rank's responses that ended in it, while the device works on the
                next step: to score them meanwhile, say. It has to be quick. Its errors end the phase. What it is given
                counts only once `generate` has returned: the ranks may still turn out to disagree. With
                `config.balance` and several replicas it is not called: responses come from elsewhere, at the end.
            samples: of each prompt, where they are not all `sampling.n`.
            max_tokens: of each prompt's responses, where they are not all `sampling.max_tokens`; at most that.
            streams: of each prompt, the key of its one sample's random numbers, to go on with a row of an earlier call
                (`RolloutBatch.streams`; the prompt is then that row's prompt and response); None draws new ones. A
                token's draw is a function of key and position in the whole sequence: no draw comes twice.

        Returns:
            This rank's share: sample j of prompt i in row i * n + j.

        Raises:
            ValueError: if a prompt is empty, has a token id that is not in the model's vocabulary, or leaves no room
                for `max_tokens` within `max_model_len`, if the ranks were given different sampling or seeds, or if what
                is given for each prompt does not fit.
            RanksDisagree: if the ranks of the group scheduled or sampled different things (rollout/agreement.py).
            RuntimeError: if the engine is closed, busy or broken by an earlier error, or has lost its weights in its
                sleep.
            MemoryError: if a GPU has not got the memory any more that the engine gave back; says who holds it.
        """
        sampling = sampling or SamplingConfig()
        seed = self._num_phases if seed is None else seed
        with self._fence.one_caller():
            self._check_weights_are_there()
            ours = ask([self._token_ids(prompt) for prompt in prompts], sampling, samples, max_tokens, streams)
            with span("share prompts"):
                of_ranks = self._share(ours, sampling, seed)
            self._check_asked(of_ranks, sampling)
            everyones = [asked for of_rank in of_ranks for asked in of_rank]
            keys = self._streams(everyones, seed)
            before = sum(asked.samples for of_rank in of_ranks[: dist.get_rank(self._together)] for asked in of_rank)
            rows = slice(before, before + sum(asked.samples for asked in ours))
            with self._fence.busy("generating"), no_backward(self._synced()):
                start = perf_counter()
                if self._balance is None:
                    on_rows = None if on_step is None else hand_out(ours, rows, self._version, on_step)
                    collected, of_this_rank = self._run(everyones, sampling, keys, on_rows), rows
                    waited = 0.0
                else:
                    collected, waited = self._run_balanced(self._balance, of_ranks, sampling, keys)
                    of_this_rank = slice(None)
                self._metrics = self._figures(perf_counter() - start - waited)
            self._num_phases += 1
        return pack(ours, collected, of_this_rank, keys[rows], self._version)

    def sync_weights(self, policy: nn.Module, version: int) -> SyncReport:
        """Copy the policy's weights into the engine; all ranks call it together, between calls of `generate`.

        Args:
            policy: a Hugging Face causal language model of the engine's architecture, plain, in DDP, in FSDP2's shards
                (`fully_shard`) or under adapters of PEFT's LoRA, which are merged on the way, parameter by parameter;
                the same on every rank.
            version: recorded by every rollout made from now on; at least 0.

        Raises:
            ValueError: if the policy lacks a parameter that the engine has, the version is negative, or an adapter
                cannot be merged (rollout/adapters.py; the engine stays usable then).
            RuntimeError: if the engine is closed, busy or broken by an earlier error.
        """
        if version < 0:
            raise ValueError(f"version is {version}; it must be at least 0")
        with self._fence.one_caller():
            check_adapters(policy)
            with self._fence.busy("syncing weights"):
                self._core.executor.take_again("weights")
                report = sync_policy(self._core, policy, version)
        self._version, self._synced, self._weights_lost = version, weakref.ref(policy), False
        return report

    def check_weights(self, policy: nn.Module) -> None:
        """Compare all that the engine holds with the policy, bit for bit; each sync by itself looks at a few layers.

        Args:
            policy: as given to the last `sync_weights`, and not changed since.

        Raises:
            StaleWeights: names the first parameter that differs.
            ValueError: if an adapter cannot be merged.
            RuntimeError: if nothing was synced yet, or not by a plan, or the weights were lost in the engine's sleep.
        """
        check_adapters(policy)
        with self._fence.one_caller():
            self._check_weights_are_there()
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
        """Give back memory that only generation needs: on the CPU the KV cache's pages, on CUDA `config.sleep`.

        The next `sync_weights` takes the memory of the weights again, and the next `generate` that of the KV cache, in
        this order, so that a sync does not add to the KV cache. Weights that were given back are lost: a sync must come
        before the next `generate`.

        Returns:
            The bytes that this rank gave back.

        Raises:
            RuntimeError: if the engine is closed, busy or broken by an earlier error.
        """
        with self._fence.one_caller(), self._fence.busy("falling asleep"):
            empty_prefix_cache(self._core)
            self._weights_lost = self.world.device.type == "cuda" and self.config.sleep == "all"
            return self._core.executor.give_back()

    def close(self) -> None:
        """Stop the execute thread and free the engine's memory. The default group stays as it is. Safe to call twice.

        Raises:
            RuntimeError: if another thread is in a call.
            TimeoutError: if the execute thread does not end within `config.shutdown_timeout_s`.
            Exception: of the worker's shutdown.
        """
        in_order = self._fence.state == "idle"
        if self._fence.close():
            try:
                self._core.close(self.config.shutdown_timeout_s)
                # A broken call may have left something under way in a group; its job ends, and must not wait for that.
                if in_order or self.world.size == 1:
                    self._let_go()
            finally:
                self._watching.close()

    def _let_go(self) -> None:
        """Free the groups, and the memory, though the caller's variable may live on."""
        groups = [self._group, self._last_words]
        if self._balance is not None:
            groups.append(self._balance.group)
        del self._core, self._agreement, self._balance, self._group, self._last_words
        for group in groups:
            dist.destroy_process_group(group)

    def __enter__(self) -> "RolloutEngine":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        if error is not None:
            # Before anything that waits for the other ranks, which may wait for this one.
            self._watch.report(error)
        self.close()

    def _build(self) -> None:
        self._group = tensor_parallel_group(self.world, self.tensor_parallel_size)
        self._last_words = tensor_parallel_group(self.world, self.tensor_parallel_size, EXPLANATION_TIMEOUT_S)
        self._agreement = Agreement(self._group, self._last_words)
        self._balance: Balance | None = None
        if self.config.balance and self.world.size > self.tensor_parallel_size:
            self._balance = Balance(tensor_parallel_group(self.world, self.world.size), self.tensor_parallel_size)
        with preserved_trainer_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own, of torch's
            # Imported here: it takes seconds, which a config error must not; and it writes into the environment.
            from rollout.backend.core import build_core

            on_cuda = self.world.device.type == "cuda"
            self._core = build_core(self.model, self.tensor_parallel_size, self.config, on_cuda)

    @property
    def _together(self) -> dist.ProcessGroup:
        """The ranks whose calls of `generate` are one: those of the tensor-parallel group, or of the job."""
        return self._group if self._balance is None else self._balance.group

    def _streams(self, everyones: Sequence[Asked], seed: int) -> np.ndarray:
        """(sequences,) int64: the keys of the random numbers of all who generate together.

        Replicas on their own draw from streams of their own: two replicas' prompts of one number have nothing to do
        with each other. Balanced ones number their prompts over the whole job, so that who answers one does not move
        its random numbers.
        """
        replica = 0 if self._balance is not None else self.world.rank // self.tensor_parallel_size
        given = [asked.stream for asked in everyones for _ in range(asked.samples)]
        return request_streams((self.config.seed, seed), given, replica)

    def _run_balanced(
        self, balance: Balance, of_ranks: list[list[Asked]], sampling: SamplingConfig, streams: np.ndarray
    ) -> tuple[Collected, float]:
        """The responses to this rank's prompts, by whichever replicas; and the seconds that this one had to wait."""
        shares = balance.shares(of_ranks)
        replica = self.world.rank // self.tensor_parallel_size
        everyones = [asked for of_rank in of_ranks for asked in of_rank]
        asked = [everyones[number] for number in shares.of_replicas[replica]]
        answers = self._run(asked, sampling, streams[shares.sequences(replica)], None)
        waited = balance.wait_for_others(self._watch.beat)
        return balance.bring_back(shares, everyones, answers), waited

    def _run(
        self,
        asked: Sequence[Asked],
        sampling: SamplingConfig,
        streams: np.ndarray,
        on_rows: Callable[[Collected, list[int]], None] | None,
    ) -> Collected:
        """All responses of this replica; `streams` has their keys."""
        from rollout.backend.core import make_requests

        self._collected = None  # nothing of the last phase passes for this one's, should it be interrupted
        self._core.executor.take_again("weights", "kv_cache")
        requests = make_requests(self._core, asked, sampling, streams.tolist())
        collected = Collected.empty(len(requests), max((each.max_tokens for each in asked), default=1))
        sizes = [each.samples for each in asked]
        self._phase = Phase(PhaseTimeline())
        on_ended = None if on_rows is None else partial(on_rows, collected)
        with preserved_trainer_state():
            drive(self._core, requests, sizes, collected, self._phase, self._agreement, self._watch.beat, on_ended)
            with span("compare ranks"):
                self._agreement.finish()
        record_phase(self._phase.timeline)
        self._collected = collected
        return collected

    def _figures(self, seconds: float) -> dict[str, float]:
        """The metrics of the phase that has just ended."""
        assert self._phase is not None and self._collected is not None
        return phase_metrics(
            self._phase.timeline,
            seconds=seconds,
            num_sequences=len(self._collected.lengths),
            response_lengths=self._collected.lengths,
            finished=self._collected.finished,
            kv_cache_usage_peak=self._phase.peak_kv_cache_usage,
            preemptions=self._phase.preemptions,
        )

    def _token_ids(self, prompt: Prompt) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int32)

    def _share(self, ours: list[Asked], sampling: SamplingConfig, seed: int) -> list[list[Asked]]:
        """Every rank's prompts, in rank order, once all who generate together are known to ask for the same thing."""
        of_what = "tensor-parallel group" if self._balance is None else "job"
        everyones = gathered((ours, sampling, seed), self._together)
        for rank, (_, theirs, their_seed) in enumerate(everyones):
            if (theirs, their_seed) != everyones[0][1:]:
                raise ValueError(
                    f"rank {rank} of the {of_what} generates with {theirs}, seed {their_seed}; "
                    f"rank 0 with {everyones[0][1]}, seed {everyones[0][2]}: pass the same on every rank"
                )
        return [asked for asked, _, _ in everyones]

    def _check_asked(self, of_ranks: list[list[Asked]], sampling: SamplingConfig) -> None:
        # Every rank checks every prompt, so that all of them raise together and none waits for the others.
        words = self._core.vocabulary
        for rank, of_rank in enumerate(of_ranks):
            for index, asked in enumerate(of_rank):
                tokens, limit = len(asked.prompt_ids), self.max_model_len - asked.max_tokens
                if not 0 < tokens <= limit:
                    raise ValueError(
                        f"prompt {index} of rank {rank} has {tokens} tokens; between 1 and {limit} fit "
                        f"(rollout.max_model_len {self.max_model_len} less sampling.max_tokens "
                        f"{asked.max_tokens}): shorten the prompt or raise rollout.max_model_len"
                    )
                lowest, highest = int(asked.prompt_ids.min()), int(asked.prompt_ids.max())
                if lowest < 0 or highest >= words:
                    raise ValueError(
                        f"prompt {index} of rank {rank} has the token id {lowest if lowest < 0 else highest}; the "
                        f"model's are 0 to {words - 1}: make the prompt with the model's own tokenizer"
                    )
                if not 0 < asked.max_tokens <= sampling.max_tokens or asked.samples < 1:
                    raise ValueError(
                        f"prompt {index} of rank {rank} is given max_tokens {asked.max_tokens} and samples "
                        f"{asked.samples}; give 1 to {sampling.max_tokens} (sampling.max_tokens), and at least 1"
                    )
                if asked.stream is not None and (asked.samples > 1 or asked.stream < 0):
                    raise ValueError(
                        f"prompt {index} of rank {rank} is given the stream {asked.stream} and samples "
                        f"{asked.samples}; a stream is at least 0, as RolloutBatch.streams has them, and one sample's"
                    )

    def _check_weights_are_there(self) -> None:
        if self._weights_lost:
            raise RuntimeError(
                "the engine gave its weights back when it fell asleep (rollout.sleep is all): call sync_weights first"
            )


def check_same_config(model: str, config: RolloutConfig) -> None:
    """Compare what the engine is built from; all ranks of the job call it together.

    Raises:
        ValueError: on every rank, if two of them were given something else.
    """
    everyones = gathered((model, config))
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            raise ValueError(
                f"rank {rank} builds its engine from {theirs}, rank 0 from {everyones[0]}: pass the same on every "
                "rank, the seed included"
            )


def hand_out(
    asked: Sequence[Asked], share: slice, version: int, on_step: OnStep
) -> Callable[[Collected, list[int]], None]:
    """`on_step` for rows of the group's tokens: those of this rank's share, numbered as it numbers them."""
    prompt_of_row = [index for index, each in enumerate(asked) for _ in range(each.samples)]

    def on_rows(collected: Collected, rows: list[int]) -> None:
        ended = []
        for row in rows:
            if share.start <= row < share.stop:
                number = row - share.start
                index, length = prompt_of_row[number], collected.lengths[row]
                rollout = Rollout(
                    prompt_ids=asked[index].prompt_ids,
                    response_ids=collected.token_ids[row, :length].copy(),
                    logprobs=collected.logprobs[row, :length].copy(),
                    finish_reason="stop" if collected.finished[row] else "length",
                    prompt_index=index,
                    version=version,
                )
                ended.append((number, rollout))
        on_step(ended)

    return on_rows


def ask(
    prompts: Sequence[np.ndarray],
    sampling: SamplingConfig,
    samples: Sequence[int] | None,
    max_tokens: Sequence[int] | None,
    streams: Sequence[int | None] | None,
) -> list[Asked]:
    """What each prompt asks for: as given for it, else as `sampling` has it.

    Raises:
        ValueError: if a list has not one entry a prompt.
    """
    for name, given in (("samples", samples), ("max_tokens", max_tokens), ("streams", streams)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"{name} has {len(given)} entries for {len(prompts)} prompts; give one a prompt, or None")
    samples = [sampling.n] * len(prompts) if samples is None else samples
    max_tokens = [sampling.max_tokens] * len(prompts) if max_tokens is None else max_tokens
    streams = [None] * len(prompts) if streams is None else streams
    return [
        Asked(prompt, int(count), int(limit), None if stream is None else int(stream))
        for prompt, count, limit, stream in zip(prompts, samples, max_tokens, streams, strict=True)
    ]


def pack(asked: Sequence[Asked], collected: Collected, rows: slice, streams: np.ndarray, version: int) -> RolloutBatch:
    """This rank's rows of the group's tokens, without padding; `streams` (rows,) int64."""
    lengths = collected.lengths[rows]
    valid = np.arange(collected.token_ids.shape[1]) < lengths[:, None]
    repeated = [each.prompt_ids for each in asked for _ in range(each.samples)]
    sizes = np.array([each.samples for each in asked], np.int64)
    return RolloutBatch(
        prompt_ids=np.concatenate(repeated) if repeated else np.zeros(0, np.int32),
        prompt_lengths=np.array([len(prompt) for prompt in repeated], np.int32),
        response_ids=collected.token_ids[rows][valid],
        response_lengths=lengths,
        logprobs=collected.logprobs[rows][valid],
        finished=collected.finished[rows],
        prompt_index=np.repeat(np.arange(len(asked), dtype=np.int32), sizes),
        version=version,
        streams=streams,
    )
