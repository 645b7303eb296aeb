"""One process: what an exception on the execute thread does, and misuse; results to OUT/rank0.json."""

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rollout import RolloutConfig, RolloutEngine, SamplingConfig

CONFIG = RolloutConfig(max_model_len=128, kv_cache_gib=0.25, enforce_eager=True, shutdown_timeout_s=5.0)
SAMPLING = SamplingConfig(max_tokens=16, ignore_eos=True)
PROMPTS = [[10, 20, 30]] * 8


class PlantedError(Exception):
    pass


def raises_in_step(engine: RolloutEngine, step: int) -> None:
    worker = engine._core.executor.driver_worker.worker
    execute, count = worker.execute_model, iter(range(10**6))

    def execute_model(scheduler_output):
        if next(count) == step:
            raise PlantedError(f"in {threading.current_thread().name}")
        return execute(scheduler_output)

    worker.execute_model = execute_model


def failure(call) -> dict:
    start = time.perf_counter()
    try:
        call()
    except BaseException as error:
        return {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
            "seconds": time.perf_counter() - start,
        }
    return {"type": None}


def seconds_of_a_slow_start(engine: RolloutEngine) -> dict[str, float]:
    """A phase whose memory takes a while to come back: what the metrics say that it took, and what it took."""
    take_again = engine._core.executor.take_again
    engine._core.executor.take_again = lambda *parts: (time.sleep(0.5), take_again(*parts))
    start = time.perf_counter()
    engine.generate(PROMPTS, SAMPLING)
    engine._core.executor.take_again = take_again
    return {"said": engine.metrics["rollout/seconds"], "taken": time.perf_counter() - start}


def during_a_phase(engine: RolloutEngine, policy: torch.nn.Module) -> list[dict]:
    """What another thread is told while this one generates."""
    told: list[dict] = []

    def backward() -> None:
        policy(torch.tensor([[1, 2, 3]])).logits.sum().backward()

    def other() -> None:
        while engine._fence.state != "generating":
            time.sleep(0.001)
        told.append(failure(lambda: engine.generate(PROMPTS, SAMPLING)))
        told.append(failure(lambda: engine.sync_weights(None, version=0)))
        told.append(failure(backward))
        told.append(failure(engine.close))

    thread = threading.Thread(target=other)
    thread.start()
    engine.generate(PROMPTS * 8, SamplingConfig(max_tokens=100, ignore_eos=True))
    thread.join()
    told.append(failure(backward))
    return told


def in_a_fork(call, out: Path) -> dict:
    pid = os.fork()
    if pid == 0:
        (out / "fork.json").write_text(json.dumps(failure(call)))
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads((out / "fork.json").read_text())


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    results = {}
    engine = RolloutEngine(model, CONFIG)
    results["too_long"] = failure(lambda: engine.generate([[10] * 113], SAMPLING))
    results["empty"] = failure(lambda: engine.generate([[]], SAMPLING))
    results["above_the_vocabulary"] = failure(lambda: engine.generate([[10], [10, 512, 11]], SAMPLING))
    results["below_the_vocabulary"] = failure(lambda: engine.generate([[10, -1]], SAMPLING))
    results["version"] = failure(lambda: engine.sync_weights(None, version=-1))
    results["no_prompts"] = len(engine.generate([], SAMPLING))
    results["still_usable"] = len(engine.generate(PROMPTS, SAMPLING))
    results["slow_start"] = seconds_of_a_slow_start(engine)
    policy = AutoModelForCausalLM.from_pretrained(model)
    engine.sync_weights(policy, version=0)
    results["while_generating"] = during_a_phase(engine, policy)
    results["in_a_fork"] = in_a_fork(lambda: engine.generate(PROMPTS, SAMPLING), out)
    results["usable_after_misuse"] = len(engine.generate(PROMPTS, SAMPLING))
    raises_in_step(engine, step=5)
    results["planted"] = failure(lambda: engine.generate(PROMPTS, SAMPLING))
    results["digest_after_failure"] = failure(engine.digest)
    results["after_failure"] = failure(lambda: engine.generate(PROMPTS, SAMPLING))
    engine.close()
    engine.close()
    results["after_close"] = [
        failure(call)
        for call in (
            lambda: engine.generate(PROMPTS, SAMPLING),
            engine.describe,
            lambda: engine.max_model_len,
            lambda: engine.everyones(1),
            lambda: engine.any_rank(True),
        )
    ]

    engine = RolloutEngine(model, CONFIG)
    results["rebuilt"] = len(engine.generate(PROMPTS, SAMPLING))
    hang = threading.Event()
    engine._core.executor.thread.submit(hang.wait)
    results["hanging_close"] = failure(engine.close)
    hang.set()
    engine._core.executor.thread.close(timeout_s=10.0)
    results["threads_left"] = [thread.name for thread in threading.enumerate() if thread.name.startswith("execute")]
    (out / "rank0.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
