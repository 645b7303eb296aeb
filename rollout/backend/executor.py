"""The external-launcher executor: one worker a rank, in the trainer's process, owned by an execute thread.

Every rank runs the same scheduler over the same requests, so no rank commands another. The main thread schedules; the
execute thread runs the model. With asynchronous scheduling two batches are under way, so that step i+1 is scheduled
while step i runs.
"""

import os
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from copy import copy
from multiprocessing import Lock
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import vllm.envs as envs
from vllm.distributed.parallel_state import get_world_group
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase

from rollout.backend.attention import replace_attention
from rollout.backend.execute_thread import ExecuteThread
from rollout.backend.refusals import refuse_different_settings, refuse_what_ranks_decide_alone
from rollout.backend.sampler import GatheredSampler, RequestSeeds, ShardedSampler, shard_sampling
from rollout.backend.shared_memory import unlink_shared_memory
from rollout.backend.sleep import SleepingMemory
from rollout.backend.sync_plan import Layer
from rollout.backend.weight_sync import Loaded, Weights, WeightSync
from rollout.backend.worker import unlink_broadcast_queue
from rollout.isolation import preserved_random_state, preserved_trainer_state
from rollout.world import check_machines, closed_to_the_network, init_world, machines_of_ranks

StepObserver = Callable[[float, float], None]
T = TypeVar("T")


COPY_EVENTS = ("copy_event", "async_copy_ready_event")
"""What an asynchronous output calls the event behind its copy to the host: in vLLM's V2 model runner, and in V1's."""
COPY_POLL_S = 1e-4


class StepFuture(Future):
    """A step's output. On CUDA the thread only launches: whoever asks for the result waits for its copy to the host.

    Attributes:
        launched: set when the inputs are prepared and the device is at work: on CUDA when the launch has returned, on
            the CPU when the forward begins; at the latest when the step has ended or failed.
    """

    device_span: tuple[float, float] | None = None
    """When the device began and ended the step, where that is known (`time.perf_counter` seconds)."""
    _on_host: ModelRunnerOutput | None = None

    def __init__(self) -> None:
        super().__init__()
        self.launched = threading.Event()
        self.add_done_callback(lambda _: self.launched.set())

    def wait(self, timeout: float) -> bool:
        """Wait until `result` can return, or raise, at once; False if it cannot after so many seconds."""
        deadline = time.perf_counter() + timeout
        try:
            if self.exception(timeout) is not None:
                return True
        except TimeoutError:
            return False
        output = super().result()
        event = next((getattr(output, name) for name in COPY_EVENTS if hasattr(output, name)), None)
        while self._on_host is None and event is not None and not event.query():
            if time.perf_counter() >= deadline:
                return False
            time.sleep(COPY_POLL_S)
        return True

    def result(self, timeout: float | None = None) -> Any:
        """The step's output, once its tokens are on the host; waits for both.

        Raises:
            TimeoutError: if they are not after so many seconds.
            Exception: whatever the step raised.
        """
        if timeout is not None and not self.wait(timeout):
            raise TimeoutError
        output = super().result()
        if self._on_host is None:
            self._on_host = output.get_output() if isinstance(output, AsyncModelRunnerOutput) else output
            self.device_span = getattr(output, "device_span", None)
        return self._on_host


class HeldStep(Future):
    """`execute_model`'s answer, held until `sample_tokens` comes, so that both travel to the thread as one job.

    If somebody waits for it first (vLLM's synchronous step does), the execution goes alone.
    """

    def __init__(self, executor: "TorchrunExecutor", scheduler_output: SchedulerOutput) -> None:
        super().__init__()
        self.scheduler_output = scheduler_output
        self._executor = executor

    def result(self, timeout: float | None = None) -> Any:
        """As a future's; the execution then goes without its sampling."""
        self._executor.release(self)
        return super().result(timeout)


class TorchrunExecutor(Executor):
    """vLLM executor for jobs started by torchrun, or by a launcher that sets its variables.

    It shares the default process group that the trainer initialised (gloo on the CPU, nccl on CUDA), and makes it where
    there is none. It is a drop-in for vLLM's own "external_launcher":

        LLM(model, tensor_parallel_size=2, distributed_executor_backend=TorchrunExecutor)

    Asynchronous scheduling is on, on the CPU too; `additional_config={"async_scheduling": False}` switches it off.
    Requests without a seed get one from the engine's own stream: the trainer's generators are neither read nor moved,
    so they may differ between ranks.
    """

    thread: ExecuteThread
    driver_worker: Any = None
    """vLLM's WorkerWrapperBase; None once it is shut down."""
    kernels: tuple[str, ...] = ()
    """Of rollout/backend/kernels/, those that this machine and this model run."""
    observer: StepObserver | None = None
    """Called on the execute thread after each step with its start and end (`time.perf_counter` seconds)."""

    def _init_executor(self) -> None:
        if envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            raise ValueError(
                "VLLM_ENABLE_V1_MULTIPROCESSING is 1, which puts the engine in a process of its own: set it to 0 "
                "before vllm is imported (importing rollout.backend first does so)"
            )
        refuse_what_ranks_decide_alone(self.vllm_config)
        # Some thirty places in vLLM look for this string; a class in its place would skip them all.
        self.parallel_config.distributed_executor_backend = "external_launcher"
        self._held: HeldStep | None = None
        self._running = StepFuture()
        self._request_seeds: RequestSeeds | None = None
        self._sharded_sampler: ShardedSampler | None = None
        self._weight_sync: WeightSync | None = None
        self._sleeping_memory: SleepingMemory | None = None
        with preserved_trainer_state(), closed_to_the_network():
            world = init_world()
            check_machines(self.parallel_config.tensor_parallel_size, machines_of_ranks())
            refuse_different_settings(self.vllm_config)
            self._seeds = seeds_of_replica(
                self.model_config.seed, world.rank // self.parallel_config.tensor_parallel_size
            )
            # On this thread: a default group of nccl alone would send the name by way of the current device, which a
            # thread that has not set its own takes to be the first one, on every rank.
            job = _job_name()
            self.thread = ExecuteThread(f"execute-rank{world.rank}")
            try:
                self.thread.run(self._build_worker, job, world.rank, world.local_rank)
            except BaseException:
                self.shutdown()
                raise
        asynchronous = self.vllm_config.additional_config.get("async_scheduling", True)
        if current_platform.is_cpu() and asynchronous:
            # The worker is built by now and stays in its blocking mode, which the execute thread makes asynchronous;
            # the scheduler, built next, reads this flag.
            self.scheduler_config.async_scheduling = True

    def _build_worker(self, job: str, rank: int, local_rank: int) -> None:
        self.driver_worker = WorkerWrapperBase(rpc_rank=0)
        self.driver_worker.init_worker(
            all_kwargs=[
                {
                    "vllm_config": self.vllm_config,
                    "local_rank": local_rank,
                    "rank": rank,
                    # The group exists already; the CPU communicator names its segments after the last ":".
                    "distributed_init_method": f"env://:{job}",
                    "is_driver_worker": True,
                    "shared_worker_lock": Lock(),
                }
            ]
        )
        self.driver_worker.init_device()
        unlink_shared_memory(job)
        self.driver_worker.load_model()
        current_platform.update_block_size_for_backend(self.vllm_config)

    def compile_or_warm_up_model(self) -> None:
        """vLLM's, and what our kernels replace in the CPU's runner."""
        super().compile_or_warm_up_model()
        unlink_broadcast_queue()
        if current_platform.is_cpu() and not self.simulated:
            self.thread.run(self._adapt_cpu_runner)

    def _adapt_cpu_runner(self) -> None:
        runner = self.driver_worker.model_runner
        forward = runner._model_forward

        def announced_forward(*args: Any, **kwargs: Any) -> Any:
            self._running.launched.set()
            return forward(*args, **kwargs)

        runner._model_forward = announced_forward
        attention = replace_attention(runner.get_model()) > 0
        self._request_seeds = RequestSeeds(runner)
        GatheredSampler(runner, self._request_seeds)
        token_ranks = self.vllm_config.additional_config.get("token_ranks", True)
        compiled = not self.model_config.enforce_eager
        self._sharded_sampler = shard_sampling(runner, self._request_seeds, token_ranks, compiled)
        head = self._sharded_sampler is not None and self._sharded_sampler.streams
        self.kernels = tuple(name for name, runs in (("attention", attention), ("head", head)) if runs)

    def load_policy_weights(self, weights: Weights) -> Loaded:
        """Replace the worker's weights on the execute thread, behind whatever is queued there.

        Raises:
            ValueError: if the policy lacks a parameter that the engine has.
            StaleWeights: if the engine holds something else afterwards.
        """
        return self._run_between_updates(lambda: self._sync().load(weights))

    def check_policy_weights(self, weights: Weights) -> None:
        """Compare all of the worker's weights with the policy's, on the execute thread.

        Raises:
            StaleWeights: names the first that differs.
        """
        self._run_between_updates(lambda: self._sync().check(weights))

    def give_back(self) -> int:
        """Memory that only generation needs, behind whatever is queued; returns the bytes."""
        return self.thread.run(lambda: self._memory().give_back())

    def take_again(self, *parts: str) -> None:
        """Of "weights" and "kv_cache" what was given back.

        Raises:
            MemoryError: if the GPU has not got it any more; says who holds it.
        """
        self.thread.run(lambda: self._memory().take_again(*parts))

    def sync_layers(self) -> list[Layer]:
        """What fills what in a sync by the plan; empty without one."""
        return self.thread.run(lambda: self._sync().layers)

    def _run_between_updates(self, job: Callable[[], T]) -> T:
        """Run what reads the policy's weights on the execute thread, as the trainer has them now."""
        # The policy's last update may still be under way on a stream that the execute thread's does not know.
        written = torch.cuda.current_stream().record_event() if current_platform.is_cuda() else None

        def ordered() -> T:
            if written is not None:
                torch.cuda.current_stream().wait_event(written)
            with preserved_random_state():
                result = job()
            if written is not None:
                torch.cuda.current_stream().synchronize()  # and the policy's next update must not overtake the reads
            return result

        return self.thread.run(ordered)

    def _memory(self) -> SleepingMemory:
        if self._sleeping_memory is None:
            sleep = self.vllm_config.additional_config.get("sleep", "nothing")
            worker = self.driver_worker
            self._sleeping_memory = SleepingMemory(worker, worker.model_runner.kv_caches, sleep)
        return self._sleeping_memory

    def _sync(self) -> WeightSync:
        if self._weight_sync is None:
            worker = self.driver_worker.worker
            assert worker is not None
            self._weight_sync = WeightSync(worker, reads_head=self._sharded_sampler is not None)
        return self._weight_sync

    @property
    def simulated(self) -> bool:
        """True on the simulated accelerator, whose runner samples nothing."""
        return "simulate_step_ms" in self.vllm_config.additional_config

    def determine_available_memory(self) -> list[int]:
        """KV-cache bytes every rank can give: the least of all ranks, so that their schedulers agree."""
        memory = torch.tensor(super().determine_available_memory(), dtype=torch.int64)
        dist.all_reduce(memory, op=dist.ReduceOp.MIN, group=get_world_group().cpu_group)
        return memory.tolist()

    def collective_rpc(
        self,
        method: str | Callable,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict | None = None,
        non_block: bool = False,
    ) -> Any:
        """Run a worker method, by name or as a function of the worker, on the execute thread; this rank only."""

        def call() -> list[Any]:
            with preserved_random_state():
                return [run_method(self.driver_worker, method, args, kwargs or {})]

        return self.thread.submit(call) if non_block else self.thread.run(call)

    def submit_step(self, scheduler_output: SchedulerOutput, grammar_output: GrammarOutput | None = None) -> StepFuture:
        """Queue one step, execution and sampling in one job; returns at once."""
        self._seed_new_requests(scheduler_output)
        future = StepFuture()
        self.thread.submit(self._step, future, scheduler_output, grammar_output, future=future, fatal=True)
        return future

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | None | Future[ModelRunnerOutput | None]:
        """vLLM's first half of a step: held until `sample_tokens` comes, where that has to come."""
        self._seed_new_requests(scheduler_output)
        held = self._held = HeldStep(self, scheduler_output)
        samples_at_once = (
            scheduler_output.total_num_scheduled_tokens > 0 and not scheduler_output.pending_structured_output_tokens
        )
        if not samples_at_once:
            self.release(held)
        return held if non_block else held.result()

    def sample_tokens(
        self, grammar_output: GrammarOutput | None, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """vLLM's second half of a step: both halves go to the execute thread as one job."""
        held, self._held = self._held, None
        if held is None:
            future = StepFuture()
            self.thread.submit(self.driver_worker.sample_tokens, grammar_output, future=future, fatal=True)
        else:
            future = self.submit_step(held.scheduler_output, grammar_output)
            held.set_result(None)
        return future if non_block else future.result()

    def release(self, held: HeldStep) -> None:
        """Send a held execution without its sampling."""
        if self._held is held:
            self._held = None
            self.thread.submit(self._execute, held.scheduler_output, future=held, fatal=True)

    def check_health(self) -> None:
        """Nothing to ask: a failed step has told its waiter already."""

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Shut the worker down on its own thread, end the thread, and let go of the weights and the KV cache.

        Raises:
            TimeoutError: if the thread hangs; says where it stands.
            Exception: of the worker's shutdown; a warning, where an earlier error is the one to be heard of.
        """
        worker, self.driver_worker = self.driver_worker, None
        ended = None if worker is None else self.thread.submit(worker.shutdown, always=True)
        self.thread.close(timeout_s)
        # What holds the weights and the KV cache: the user's `engine` may live on.
        self.observer = self._held = self._weight_sync = self._sleeping_memory = None
        self._request_seeds = self._sharded_sampler = None
        error = None if ended is None else ended.exception()
        if error is None:
            return
        if not self.thread.has_failed and sys.exc_info()[0] is None:
            raise error
        story = "".join(traceback.format_exception(error))
        warnings.warn(f"the engine's worker did not shut down cleanly: {story}", stacklevel=2)

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """vLLM asks; True on every device."""
        return True

    def _step(
        self, future: StepFuture, scheduler_output: SchedulerOutput, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        self._running = future
        start = time.perf_counter()
        output = self._execute(scheduler_output)
        if output is None:
            output = self.driver_worker.sample_tokens(grammar_output)
        if self.observer is not None:
            self.observer(start, time.perf_counter())
        return output

    def _execute(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        if self._request_seeds is not None and (
            scheduler_output.scheduled_new_reqs or scheduler_output.finished_req_ids
        ):
            if self._sharded_sampler is not None:
                self._sharded_sampler.admit(scheduler_output)
            self._request_seeds.admit(scheduler_output)
        return self.driver_worker.execute_model(scheduler_output)

    def _seed_new_requests(self, scheduler_output: SchedulerOutput) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            if request.sampling_params is not None and request.sampling_params.seed is None:
                # A copy: callers may share one SamplingParams among requests, which must not share a seed.
                request.sampling_params = copy(request.sampling_params)
                request.sampling_params.seed = int(self._seeds.integers(2**63 - 1))


def seeds_of_replica(seed: int, replica: int) -> np.random.Generator:
    """Draws the seeds of requests that have none: the same on a replica's ranks, and others for each replica.

    >>> [int(seeds_of_replica(0, replica).integers(100)) for replica in (0, 0, 1)]
    [85, 85, 66]
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(replica,) if replica else ()))


def _job_name() -> str:
    """A name that no other job on this host has, the same on every rank."""
    name = [f"rollout-{os.getpid()}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(name, src=0)
    return name[0]
