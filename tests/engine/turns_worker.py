"""Runs in every rank: rollouts of several turns, and the same by hand; what came is written to OUT/rankN.json.

torchrun --nproc_per_node=2 turns_worker.py MODEL OUT
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rollout import (
    Draft,
    Rollout,
    RolloutBatch,
    RolloutConfig,
    RolloutEngine,
    SamplingConfig,
    advance_drafts,
    generate_turns,
    one_by_one,
)
from tests.engine.trainer_state import digest

STOPS = list(range(100, 160))  # of 512 words: some turns end after a few tokens, some by the limit
SAMPLING = SamplingConfig(max_tokens=30, n=3, stop_token_ids=STOPS)
SEED, MAX_TURNS, MAX_MODEL_LEN, BLOCK, PART = 5, 4, 112, 32, 5


def prompts(rank: int) -> list[list[int]]:
    """Of 33 to 70 tokens: a block of the cache or two are whole."""
    rng = np.random.default_rng(rank)
    return [rng.integers(200, 500, size=rng.integers(33, 71)).tolist() for _ in range(6 + 2 * rank)]


def environment(rollout: Rollout) -> list[int] | None:
    """A function of what was said; for some there is nothing to add."""
    last = int(rollout.response_ids[-1])
    return None if last % 5 == 0 else [160 + last % 30] * (1 + last % 7)


def by_hand(engine: RolloutEngine, reverse: bool) -> dict[str, list]:
    """All ranks' rows by nobody but the last rank, a turn a call; the others give no prompts."""
    first = engine.generate(prompts(engine.world.rank), SAMPLING, seed=SEED)
    gathered = engine.everyones([row_of(first, number) for number in range(len(first))])
    rows = [row for of_rank in gathered for row in of_rank]
    for turn in range(2, MAX_TURNS + 1):
        going = [row for row in rows if row["goes_on"]]
        for row in going:
            observation = environment(view(row))
            room = MAX_MODEL_LEN - len(row["prompt"]) - len(row["response"])
            left = min(SAMPLING.max_tokens - sum(row["generated"]), room - len(observation or []))
            row["finished"] = observation is None
            row["goes_on"] = observation is not None and left > 0
            if row["goes_on"]:
                row["response"] += observation
                row["generated"] += [0] * len(observation)
                row["left"] = left
        going = [row for row in going if row["goes_on"]][:: -1 if reverse else 1]
        mine = going if engine.world.rank == engine.world.size - 1 else []
        batch = engine.generate(
            [row["prompt"] + row["response"] for row in mine],
            SAMPLING,
            seed=1000 + turn,  # of no consequence: every row has its stream
            samples=[1] * len(mine),
            max_tokens=[row["left"] for row in mine],
            streams=[row["stream"] for row in mine],
        )
        said = engine.everyones([row_of(batch, number) for number in range(len(mine))])[-1]
        for row, new in zip(going, said, strict=True):
            row["response"] += new["response"]
            row["generated"] += new["generated"]
            row["finished"], row["goes_on"] = new["finished"], new["finished"] and turn < MAX_TURNS
    return {name: [row[name] for row in rows] for name in ("response", "generated", "finished")}


def row_of(batch: RolloutBatch, number: int) -> dict[str, Any]:
    rollout = batch[number]
    return {
        "prompt": rollout.prompt_ids.tolist(),
        "response": rollout.response_ids.tolist(),
        "generated": [1] * len(rollout.response_ids),
        "finished": rollout.finish_reason == "stop",
        "goes_on": rollout.finish_reason == "stop",
        "stream": int(batch.streams[number]),
        "left": 0,
    }


def view(row: dict[str, Any]) -> Rollout:
    response = np.array(row["response"], np.int32)
    return Rollout(np.array(row["prompt"], np.int32), response, np.zeros(len(response)), "stop", 0, 0)


def in_turns(engine: RolloutEngine) -> dict[str, Any]:
    """The rows of all ranks; and what the last call of `generate` computed of them."""
    computed: list[tuple[int, int]] = []
    generate = engine.generate

    def noted(given, *args, **kwargs):
        batch = generate(given, *args, **kwargs)
        contexts = engine.everyones(sum(map(len, given)))
        computed.append((sum(contexts), int(engine.timeline.scheduled_tokens.sum() - engine._collected.lengths.sum())))
        return batch

    engine.generate = noted
    mine = prompts(engine.world.rank)
    batch, metrics = generate_turns(engine, mine, SAMPLING, one_by_one(environment), MAX_TURNS, seed=SEED)
    engine.generate = generate
    ours = [
        (
            rollout.response_ids.tolist(),
            rollout.generated.astype(int).tolist(),
            rollout.finish_reason == "stop",
            rollout.logprobs.tolist(),
        )
        for rollout in batch
    ]
    rows = [row for of_rank in engine.everyones(ours) for row in of_rank]
    return {
        "response": [row[0] for row in rows],
        "generated": [row[1] for row in rows],
        "finished": [row[2] for row in rows],
        "logprobs": [row[3] for row in rows],
        "rows": len(batch),
        "share": digest(batch.response_ids, batch.logprobs, batch.generated, batch.streams),
        "unsampled_logprobs": float(np.abs(batch.logprobs[~batch.generated]).sum()),
        "computed": computed,
        "metrics": metrics,
    }


def in_parts(engine: RolloutEngine) -> dict[str, Any]:
    """The same rows, five tokens a phase; between two phases the engine sleeps, which empties the cache."""
    drafts = [Draft(np.array(ids, np.int32), 0) for ids in prompts(engine.world.rank)]
    drafts = [replace(draft) for draft in drafts for _ in range(SAMPLING.n)]
    phases = 0
    while engine.any_rank(any(not draft.done for draft in drafts)):
        for draft in drafts:
            draft.allowance = PART
        advance_drafts(engine, drafts, SAMPLING, one_by_one(environment), MAX_TURNS, SEED)
        engine.sleep()
        phases += 1
    ours = [
        (d.response_ids.tolist(), d.generated.astype(int).tolist(), d.finished, d.logprobs.tolist()) for d in drafts
    ]
    rows = [row for of_rank in engine.everyones(ours) for row in of_rank]
    names = ("response", "generated", "finished", "logprobs")
    return {name: [row[at] for row in rows] for at, name in enumerate(names)} | {"phases": phases}


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    results: dict[str, Any] = {}
    for name, more in (
        ("asynchronous", {}),
        ("plain", {"async_scheduling": False, "enable_prefix_caching": False}),
    ):
        config = RolloutConfig(
            max_model_len=MAX_MODEL_LEN, kv_cache_gib=0.125, enforce_eager=True, block_size=BLOCK, **more
        )
        with RolloutEngine(model, config) as engine:
            results[name] = in_turns(engine)
            if name == "asynchronous":
                results["by_hand"], results["backwards"] = by_hand(engine, False), by_hand(engine, True)
                results["in_parts"] = in_parts(engine)
            rank = engine.world.rank
    (out / f"rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
