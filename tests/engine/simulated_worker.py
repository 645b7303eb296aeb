"""Stock vLLM on the simulated accelerator, several engines one after another; writes OUT/rankN.json.

torchrun --nproc_per_node=2 simulated_worker.py MODEL OUT
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import rollout.backend

from vllm import LLM, SamplingParams  # isort: skip  (rollout.backend sets vLLM's environment first)

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEP_MS = 50.0
NUM_SEQUENCES, MAX_TOKENS = 24, 12
LATE_STEP, LATE_S = 8, 0.6
ENGINES: list[LLM] = []  # kept: one that is collected takes the process groups down under the next, on one rank first
SCENARIOS: dict[str, dict] = {
    "synchronous": {"async_scheduling": False},
    "asynchronous": {"async_scheduling": True},
    "synchronous_stops": {"async_scheduling": False, "simulate_stops": 4},
    "asynchronous_stops": {"async_scheduling": True, "simulate_stops": 4},
}


class Watched:
    """What the engine's runner does, step by step.

    Attributes:
        launch_s: from the call of execute_model to the return of sample_tokens.
        outputs: that sample_tokens returned.
        fed: token id by request number and position, of every forward's inputs.
        on_device: for every forward, True if the runner took tokens of the step before from the device.
    """

    def __init__(self, llm: LLM) -> None:
        self.core = llm.llm_engine.engine_core.engine_core
        self.runner: Any = self.core.model_executor.driver_worker.worker.model_runner
        assert type(self.runner).__module__ == f"{rollout.backend.__name__}.simulated"
        self.launch_s: list[float] = []
        self.outputs: list[Any] = []
        self.fed: dict[tuple[int, int], int] = {}
        self.on_device: list[bool] = []
        execute, sample, forward = self.runner.execute_model, self.runner.sample_tokens, self.runner._model_forward

        def timed_execute(*args: Any) -> Any:
            self.start = time.perf_counter()
            return execute(*args)

        def timed_sample(*args: Any) -> Any:
            output = sample(*args)
            self.launch_s.append(time.perf_counter() - self.start)
            self.outputs.append(output)
            return output

        def noted_forward(input_ids: Any, positions: Any, **rest: Any) -> Any:
            batch = self.runner.input_batch
            bounds = self.runner.query_start_loc.np
            for row, request_id in enumerate(batch.req_ids):
                for index in range(bounds[row], bounds[row + 1]):
                    self.fed[int(request_id.split("-")[0]), int(positions[index])] = int(input_ids[index])
            self.on_device.append(batch.prev_sampled_token_ids is not None)
            if RANK == 1 and len(self.on_device) == LATE_STEP + 1:
                time.sleep(LATE_S)
            return forward(input_ids, positions, **rest)

        self.runner.execute_model, self.runner.sample_tokens = timed_execute, timed_sample
        self.runner._model_forward = noted_forward


def prompts() -> list[list[int]]:
    """Of 5 to 28 tokens: with 64 tokens a step, most are cut into chunks somewhere."""
    return [[10 + (index * 7 + place) % 400 for place in range(5 + index)] for index in range(NUM_SEQUENCES)]


def run(model: str, name: str, wishes: dict) -> dict:
    start = time.perf_counter()
    llm = LLM(
        model,
        tensor_parallel_size=WORLD_SIZE,
        distributed_executor_backend="external_launcher" if WORLD_SIZE > 1 else None,
        worker_cls="rollout.backend.simulated.SimulatedWorker",
        additional_config={"simulate_step_ms": STEP_MS, **wishes},
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        block_size=32,
        # 20 blocks of 32 KiB on one rank: 16 sequences want up to 32 of them, so that some are preempted.
        kv_cache_memory_bytes=20 * 2**15,
        enforce_eager=name == "synchronous",
    )
    start_s = time.perf_counter() - start
    ENGINES.append(llm)
    watched = Watched(llm)
    stops = "simulate_stops" in wishes
    params = SamplingParams(max_tokens=MAX_TOKENS, logprobs=0, ignore_eos=not stops, detokenize=False)
    given = prompts()
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in given], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    texts = {
        number: prompt + list(output.outputs[0].token_ids)
        for number, (prompt, output) in enumerate(zip(given, outputs, strict=True))
    }
    expected = {(number, place): token for number, text in texts.items() for place, token in enumerate(text[:-1])}
    return {
        "scheduler": type(watched.core.scheduler).__name__,
        "queue": watched.core.batch_queue_size,
        "start_s": start_s,
        "seconds": seconds,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [
            [place[token].logprob for place, token in zip(each.logprobs, each.token_ids, strict=True)]
            for each in (output.outputs[0] for output in outputs)
        ],
        "reasons": [output.outputs[0].finish_reason for output in outputs],
        "launch_s": watched.launch_s,
        "spans": [output.device_span for output in watched.outputs],
        "kinds": sorted({type(output).__name__ for output in watched.outputs}),
        "on_device": watched.on_device,
        "wrongly_fed": [list(key) for key, token in expected.items() if watched.fed.get(key) != token],
    }


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    from vllm.model_executor.models.llama import LlamaForCausalLM

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    LlamaForCausalLM.forward = LlamaForCausalLM.compute_logits = never
    results = {name: run(model, name, wishes) for name, wishes in SCENARIOS.items()}
    (out / f"rank{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
