"""Stock vLLM beside ours, for benchmarks: LLM.generate as people call it, with the time of every step noted."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from rollout.backend.memory import GIB
from rollout.backend.shared_memory import unlink_shared_memory
from rollout.backend.worker import unlink_broadcast_queue

SIMULATED_WORKER = "rollout.backend.simulated.SimulatedWorker"


class StockEngine:
    """vLLM's own LLM under torchrun ("external_launcher"), in bfloat16, without prefix caching.

    Args:
        model: a folder, or a name on the hub.
        job: a name that no other engine on this host has, the same on every rank.
        asynchronous: what to ask vLLM for; `describe` says what it made of it.
        kv_cache_gib: of this rank.
        simulate_step_ms: the time of a step on the simulated accelerator; None to run the model.
        limits: vLLM's max_model_len, max_num_seqs, max_num_batched_tokens and the like.
    """

    def __init__(
        self,
        model: str,
        job: str,
        asynchronous: bool,
        kv_cache_gib: float,
        simulate_step_ms: float | None,
        **limits: Any,
    ) -> None:
        more: dict[str, Any] = {}
        if simulate_step_ms is not None:
            wishes = {"simulate_step_ms": simulate_step_ms, "async_scheduling": asynchronous}
            more = {"worker_cls": SIMULATED_WORKER, "additional_config": wishes}
        name_shared_memory(job)
        self._llm = LLM(
            model,
            dtype="bfloat16",
            seed=0,  # external_launcher asks for one: every rank samples by itself
            distributed_executor_backend="external_launcher",
            kv_cache_memory_bytes=int(kv_cache_gib * GIB),
            async_scheduling=asynchronous,
            enable_prefix_caching=False,
            **limits,
            **more,
        )
        unlink_shared_memory(job)
        unlink_broadcast_queue()
        self._core = self._llm.llm_engine.engine_core.engine_core
        self._steps: list[tuple[float, int, int]] = []
        self._note_steps()

    def describe(self) -> dict[str, Any]:
        """What really runs, as `Core.describe`, and whether it is asynchronous."""
        return {
            "scheduler": type(self._core.scheduler).__name__,
            "executor": type(self._core.model_executor).__name__,
            "queue_depth": self._core.batch_queue_size,
            "model_runner": type(self._core.model_executor.driver_worker.model_runner).__name__,
            "asynchronous": self._core.batch_queue_size > 1,
        }

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> list[int]:
        """Sample `max_tokens` for each prompt at temperature 1, with the sampled tokens' log-probs and texts.

        Returns:
            The lengths of the responses, in tokens.
        """
        params = SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
        self._steps.clear()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def steps(self) -> np.ndarray:
        """(3, steps) of the last `generate`: when each was taken in (`perf_counter`), its tokens, its sequences."""
        return np.array(self._steps).T

    def close(self) -> None:
        """Shut down. Takes the default process group down, too: vLLM regards it as its own."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm, self._core

    def _note_steps(self) -> None:
        # Less than a microsecond a step.
        scheduler, steps = self._core.scheduler, self._steps
        update = scheduler.update_from_output

        def noted(scheduled: Any, output: Any) -> Any:
            updated = update(scheduled, output)
            tokens, sequences = scheduled.total_num_scheduled_tokens, len(scheduled.num_scheduled_tokens)
            steps.append((time.perf_counter(), tokens, sequences))
            return updated

        scheduler.update_from_output = noted


def name_shared_memory(job: str) -> None:
    """Name the shared-memory segments of external_launcher's next worker after `job`.

    vLLM's CPU communicator names them after what follows the last ":" of the init method, which external_launcher
    leaves at "env://": two stock engines side by side would share segments.
    """
    arguments = ExecutorWithExternalLauncher._distributed_args

    def named(executor: Any) -> tuple[str, int, int]:
        init_method, rank, local_rank = arguments(executor)
        return f"{init_method}:{job}", rank, local_rank

    ExecutorWithExternalLauncher._distributed_args = named
