"""vLLM's own LLM with our executor class, as the users of its external launcher write it.

torchrun --nproc_per_node=2 drop_in_worker.py MODEL [FURTHER ARGUMENTS OF LLM, AS JSON; "RANK" STANDS FOR THE RANK]
"""

import json
import os
import sys
import threading

import rollout.backend.executor as executor
from rollout.backend.executor import TorchrunExecutor

from vllm import LLM, SamplingParams  # isort: skip  (rollout.backend sets vLLM's environment first)


def further_arguments() -> dict:
    rank = os.environ.get("RANK", "0")
    return json.loads(sys.argv[2].replace('"RANK"', rank)) if len(sys.argv) > 2 else {}


def threads_that_name_the_job() -> list[str]:
    """Filled while the engine is built: the name is a collective of the default group."""
    threads: list[str] = []
    job_name = executor._job_name

    def noted() -> str:
        threads.append(threading.current_thread().name)
        return job_name()

    executor._job_name = noted
    return threads


def main() -> None:
    arguments = {
        "tensor_parallel_size": int(os.environ.get("WORLD_SIZE", "1")),
        "distributed_executor_backend": TorchrunExecutor,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 2**28,
        "enforce_eager": True,
    }
    named_on = threads_that_name_the_job()
    llm = LLM(sys.argv[1], **arguments | further_arguments())
    core = llm.llm_engine.engine_core.engine_core
    prompts = [{"prompt_token_ids": [10 + i, 20, 30]} for i in range(20)]
    params = SamplingParams(temperature=1.0, max_tokens=16, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    same = llm.generate([prompts[0]] * 8, params, use_tqdm=False)
    result = {
        "scheduler": type(core.scheduler).__name__,
        "queue": core.batch_queue_size,
        "executor": type(core.model_executor).__name__,
        "named_on": named_on,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "distinct": len({tuple(output.outputs[0].token_ids) for output in same}),
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
