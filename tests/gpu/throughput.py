"""Tokens per second on one GPU: this engine and stock vLLM, synchronous and asynchronous, in turns.

    python tests/gpu/throughput.py MODEL --prompts PROMPTS.jsonl --out FOLDER

Four processes hold one engine each on the same GPU and take turns, so that every repeat of one stands between repeats
of the others; only the one whose turn it is uses the device. All ask for the sampled token's log-prob.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SYSTEMS = ("stock_sync", "stock_async", "ours_sync", "ours_async")
"""As said by --systems; dropin_sync and dropin_async are stock's LLM with our executor."""
MEMORY_SHARE = 0.2
MAX_NUM_SEQS = 512
MAX_MODEL_LEN = 1024
OURS = ("host_gap_fraction", "schedule_ms", "launch_ms", "wait_ms", "update_ms", "decode_steps")


def prompt_ids(path: str, model: str, max_prompt_tokens: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = Path(path).read_text().splitlines()
    return [tokenizer(json.loads(line)["problem"])["input_ids"][:max_prompt_tokens] for line in lines]


class Ours:
    def __init__(self, model: str, asynchronous: bool, eager: bool) -> None:
        from rollout import RolloutConfig, RolloutEngine

        self.engine = RolloutEngine(
            model,
            RolloutConfig(
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=MAX_NUM_SEQS,
                gpu_memory_utilization=MEMORY_SHARE,
                async_scheduling=asynchronous,
                enable_prefix_caching=False,
                enforce_eager=eager,
            ),
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict:
        from rollout import SamplingConfig

        start = time.perf_counter()
        batch = self.engine.generate(prompts, SamplingConfig(max_tokens=max_tokens, ignore_eos=True))
        seconds = time.perf_counter() - start
        assert int(batch.response_lengths.sum()) == len(prompts) * max_tokens
        metrics = {name: self.engine.metrics[f"rollout/{name}"] for name in OURS}
        return {"seconds": seconds, **metrics, **self.describe()}

    def describe(self) -> dict:
        return {key: value for key, value in self.engine.describe().items() if key in ("scheduler", "model_runner")}


class Stock:
    """vLLM's own LLM, with its own executor or, dropped in, with ours."""

    def __init__(self, model: str, asynchronous: bool, eager: bool, drop_in: bool) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        from rollout.backend.executor import TorchrunExecutor

        self.llm = LLM(
            model,
            dtype="bfloat16",
            hf_overrides={"head_dtype": "float32"},
            distributed_executor_backend=TorchrunExecutor if drop_in else "external_launcher",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            gpu_memory_utilization=MEMORY_SHARE,
            async_scheduling=asynchronous,
            enable_prefix_caching=False,
            enforce_eager=eager,
            logprobs_mode="processed_logprobs",
        )

    def generate(self, prompts: list[list[int]], max_tokens: int, detokenize: bool = True) -> dict:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=1.0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=detokenize
        )
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == len(prompts) * max_tokens
        return {"seconds": seconds}


def serve(arguments: argparse.Namespace) -> None:
    """One engine's process: reads a line a turn from standard input, answers with a line on the file it was given."""
    kind, way = arguments.serve.split("_")  # stock, dropin or ours; sync or async
    answers = os.fdopen(arguments.answers, "w", buffering=1)
    start = time.perf_counter()
    if kind == "ours":
        system: Ours | Stock = Ours(arguments.model, way == "async", arguments.eager)
    else:
        system = Stock(arguments.model, way == "async", arguments.eager, drop_in=kind == "dropin")
    print(json.dumps({"built_s": time.perf_counter() - start}), file=answers)
    prompts = prompt_ids(arguments.prompts, arguments.model, arguments.max_prompt_tokens)
    for line in sys.stdin:
        turn = json.loads(line)
        batch = [prompts[i % len(prompts)] for i in range(turn.pop("batch"))]
        print(json.dumps(system.generate(batch, **turn)), file=answers)


class Turns:
    """A process that serves one system."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        reading, writing = os.pipe()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, *sys.argv[1:], f"--serve={name}", f"--answers={writing}"]
        with open(Path(arguments.out) / f"{name}.log", "w") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                pass_fds=[writing],
                stdout=log,
                stderr=log,
                text=True,
            )
        os.close(writing)
        self.answers = os.fdopen(reading)

    def answer(self) -> dict:
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended: see its log")
        return json.loads(line)

    def take(self, **turn: object) -> dict:
        assert self.process.stdin is not None
        print(json.dumps(turn), file=self.process.stdin, flush=True)
        return self.answer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--batch-sizes", default="32,64,128,256,512")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    systems: dict[str, Turns] = {}
    for name in arguments.systems.split(","):
        systems[name] = Turns(name, arguments)  # one after the other: each measures the GPU's free memory
        print(name, systems[name].answer(), flush=True)
    plans = [(name, {}) for name in systems]
    plans += [("stock_async", {"detokenize": False})] if "stock_async" in systems else []
    rows = []
    for batch in map(int, arguments.batch_sizes.split(",")):
        for repeat in range(-1, arguments.repeats):  # -1 warms up
            shift = repeat % len(plans)
            for name, extra in plans[shift:] + plans[:shift]:
                result = systems[name].take(batch=batch, max_tokens=arguments.max_tokens, **extra)
                label = name + ("_no_text" if extra else "")
                rows.append({"system": label, "batch": batch, "repeat": repeat, **result})
        for label in dict.fromkeys(row["system"] for row in rows):
            mine = [row for row in rows if (row["system"], row["batch"]) == (label, batch) and row["repeat"] >= 0]
            rates = [batch * arguments.max_tokens / row["seconds"] for row in mine]
            rest = {key: round(median(row[key] for row in mine), 4) for key in mine[0] if key in OURS}
            print(
                f"{batch:4d} {label:20s} {median(rates):9.0f} tok/s [{min(rates):.0f} .. {max(rates):.0f}] {rest}",
                flush=True,
            )
        (Path(arguments.out) / "throughput.json").write_text(json.dumps(rows))
    for system in systems.values():
        assert system.process.stdin is not None
        system.process.stdin.close()
        system.process.wait(60)


if __name__ == "__main__":
    main()
