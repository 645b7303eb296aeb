"""What scheduling costs a rank in jobs of 1 to 64 ranks: real schedulers on simulated accelerators, a few processes.

    python scripts/bench_schedulers.py --ranks 1,2,4,8,16,32,64 --processes 2 --json FILE
    python scripts/bench_schedulers.py --tensor-parallel-size 8

A replica is one tensor-parallel group; every rank of it runs the same scheduler over its replica's sequences, and
knows of no other replica. Costs are processor seconds of the thread that drives a rank (schedule, digests, take in), of
steps in which all sequences decode: what else the machine does, and how many ranks wait for the same core, is not in
them, but for the caches that they share. `rollout.backend.host_ranks` says what is left out.
"""

import argparse
import json
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts/ is no installed package

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Work:
    """What every rank has to do.

    Attributes:
        model: folder; its config alone is read.
        batch: sequences of one replica.
        prompt_tokens: of each,
        max_tokens: and of its response.
        step_ms: of the simulated accelerator.
    """

    model: str
    batch: int
    prompt_tokens: int
    max_tokens: int
    step_ms: float


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT / "models" / "smollm2-135m-tp2"), help="local folder; its config alone is read")
    add("--ranks", default="1,2,4,8,16,32,64", help="of a job, all its replicas together; a row each")
    add("--tensor-parallel-size", type=int, default=1, help="ranks of a replica")
    add("--processes", type=int, default=2, help="among which the replicas are shared out")
    add("--batch", type=int, default=512, help="sequences of a replica")
    add("--prompt-tokens", type=int, default=200)
    add("--max-tokens", type=int, default=64, help="of each response")
    add("--step-ms", type=float, default=12.0, help="of the simulated accelerator")
    add("--repeats", type=int, default=3)
    add("--json", type=Path, help="write the rows there")
    args = parser.parse_args(words)
    try:
        args.ranks = sorted({int(word) for word in args.ranks.split(",")})
    except ValueError:
        parser.error(f"--ranks is {args.ranks!r}; give whole numbers, such as 1,8,64")
    size = args.tensor_parallel_size
    for flag, value in (
        *(("--ranks", ranks) for ranks in args.ranks),
        ("--tensor-parallel-size", size), ("--processes", args.processes), ("--batch", args.batch),
        ("--prompt-tokens", args.prompt_tokens), ("--max-tokens", args.max_tokens), ("--repeats", args.repeats),
    ):  # fmt: skip
        if value < 1:
            parser.error(f"{flag} is {value}; it must be at least 1")
    if odd := [ranks for ranks in args.ranks if ranks % size]:
        parser.error(f"--ranks has {odd[0]}, which --tensor-parallel-size {size} does not divide; give multiples of it")
    if args.step_ms <= 0:
        parser.error(f"--step-ms is {args.step_ms:g}; every step takes more than 0 ms")
    if not (Path(args.model) / "config.json").is_file():
        parser.error(
            f"--model is {args.model}, which has no config.json: run `make model` first, or give another folder"
        )
    return args


def shares(replicas: int, processes: int) -> list[int]:
    """Replicas of each process.

    >>> shares(5, 2), shares(1, 2)
    ([3, 2], [1, 0])
    """
    return [(replicas - process + processes - 1) // processes for process in range(processes)]


def host(pipe: Any, barrier: Any, work: Work, replicas: int, size: int) -> None:
    """One process: builds its replicas, then runs as many of them as it is told, until it is told None."""
    from rollout.backend.host_ranks import (
        HostRank,
        group_of_one,
        host_config,
        run_ranks,
        steady_costs,
        tensor_parallel_boards,
    )

    config = host_config(work.model, work.prompt_tokens + work.max_tokens, work.batch, work.batch * work.prompt_tokens)
    group = group_of_one()
    boards = [tensor_parallel_boards(size) for _ in range(replicas)]
    ranks = [[HostRank(config, board, work.step_ms / 1e3, group) for board in of_replica] for of_replica in boards]
    prompts = [work.prompt_tokens] * work.batch
    pipe.send(None)
    while (count := pipe.recv()) is not None:
        chosen = [rank for replica in ranks[:count] for rank in replica]
        barrier.wait(TIMEOUT_S)
        if chosen:
            run_ranks(chosen, prompts, work.max_tokens)
        assert all(rank.collected.done.all() for rank in chosen)
        pipe.send([steady_costs(rank, work.batch) for rank in chosen])


def measure(args: argparse.Namespace) -> dict[int, list[float]]:
    """Microseconds of every steady step of every rank, by the number of ranks; the first round is not counted."""
    work = Work(args.model, args.batch, args.prompt_tokens, args.max_tokens, args.step_ms)
    size = args.tensor_parallel_size
    spawn = multiprocessing.get_context("spawn")  # a fork would take vLLM's threads over
    barrier = spawn.Barrier(args.processes)
    hosts = []
    for replicas in shares(max(args.ranks) // size, args.processes):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=host, args=(theirs, barrier, work, replicas, size), daemon=True)
        process.start()
        theirs.close()  # so that a host that dies ends our waiting
        hosts.append((process, ours))
    found: dict[int, list[float]] = {ranks: [] for ranks in args.ranks}
    try:
        for _, pipe in hosts:
            pipe.recv()
        for repeat in range(-1, args.repeats):
            for ranks in args.ranks:
                for (_, pipe), count in zip(hosts, shares(ranks // size, args.processes), strict=True):
                    pipe.send(count)
                costs = [cost for _, pipe in hosts for of_rank in pipe.recv() for cost in of_rank]
                if repeat >= 0:
                    found[ranks] += [cost * 1e6 for cost in costs]
                print(f"{ranks} ranks, repeat {repeat + 1}/{args.repeats}", file=sys.stderr, flush=True)
        for _, pipe in hosts:
            pipe.send(None)
    except EOFError as error:
        raise RuntimeError("a process ended early; its error stands above") from error
    finally:
        for process, pipe in hosts:
            pipe.close()
            process.join(10)
            process.kill()
    return found


def rows(found: dict[int, list[float]], size: int, processes: int) -> list[dict[str, float]]:
    """A row a number of ranks: median and the middle 80% of a step's cost, and the median over that of the fewest.

    >>> rows({1: [200.0] * 4, 8: [210.0] * 32}, size=1, processes=2)[1]["of_fewest"]
    1.05
    """
    first = median(found[min(found)])
    made = []
    for ranks, costs in found.items():
        tenths = quantiles(costs, n=10)
        made.append(
            {
                "ranks": ranks,
                "replicas": ranks // size,
                "ranks_a_process": -(-(ranks // size) // processes) * size,
                "steps": len(costs),
                "host_us": median(costs),
                "least_us": tenths[0],
                "most_us": tenths[-1],
                "of_fewest": median(costs) / first,
            }
        )
    return made


def table(found: list[dict[str, float]]) -> str:
    lines = [
        "| ranks | replicas | ranks in a process | steps of ranks | us a step, median [middle 80%] | of row one |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['ranks']} | {row['replicas']} | {row['ranks_a_process']} | {row['steps']} | "
            f"{row['host_us']:.0f} [{row['least_us']:.0f} .. {row['most_us']:.0f}] | {row['of_fewest']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    found = rows(measure(args), args.tensor_parallel_size, args.processes)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
