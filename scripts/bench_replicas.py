"""Rollout throughput of 1, 2 and 4 replicas in one job, against that of one replica times their number.

    python scripts/bench_replicas.py --simulate-step-ms 150 --json replicas.json

Each replica has a simulated accelerator that takes a set time for every step, and as many sequences as any other; so
what is measured is what replicas cost each other on the host. All ranks share this machine's cores: the step has to be
long enough that they can carry the ranks' host work, and the table says how much of a step the host took.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts/ is no installed package

from scripts.bench.inputs import check_model, find_prompts, one_layer_copy  # noqa: E402
from scripts.bench.plan import WARM_UP_TOKENS, WORKLOADS, Settings  # noqa: E402
from scripts.bench.turns import running  # noqa: E402

DEFAULT_MODEL = str(ROOT / "models" / "smollm2-135m-tp2")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="local folder or hub name")
    add("--prompts", type=Path, help='JSON lines with the key "problem"; left out: MATH-500')
    add("--replicas", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2, 4])
    add("--tensor-parallel-size", type=int, default=2, help="ranks of a replica")
    add("--batch", type=int, default=64, help="sequences of a replica")
    add("--max-tokens", type=int, default=48, help="of a response; each is run to it")
    add("--simulate-step-ms", type=float, default=150.0, help="of each replica's accelerator")
    add("--repeats", type=int, default=5)
    add("--json", type=Path, help="write everything there")
    add("--timeout", type=float, default=600.0, help="seconds that a start or a turn may take")
    args = parser.parse_args(words)
    if min(args.replicas) < 1 or args.replicas[0] != 1:
        parser.error(f"--replicas is {args.replicas}; it begins with 1, which the others are compared with")
    return args


def bench(args: argparse.Namespace, replicas: int, folder: Path) -> list[dict[str, Any]]:
    """The figures of each repeat of one job; its replicas are built, warmed up and ended here.

    Raises:
        SystemDied: if it ends or hangs.
    """
    workload = WORKLOADS["math500"]
    settings = Settings(
        system=f"replicas{replicas}_async",
        model=str(folder / "model"),
        prompts=str(find_prompts(args.prompts, folder)),
        tensor_parallel_size=args.tensor_parallel_size,
        max_tokens=args.max_tokens,
        max_prompt_tokens=workload.max_prompt_tokens,
        max_model_len=workload.max_model_len,
        max_num_seqs=args.batch,
        largest_batch=args.batch,
        step_ms=args.simulate_step_ms,
        replicas=replicas,
    )
    found = []
    with running([settings], folder / f"replicas{replicas}", args.timeout) as systems:
        ((system, _),) = systems.values()
        system.take(batch=replicas * args.batch, max_tokens=min(WARM_UP_TOKENS, args.max_tokens), trace=None)
        for repeat in range(args.repeats):
            figures = system.take(batch=replicas * args.batch, max_tokens=args.max_tokens, trace=None)
            rate = replicas * args.batch * args.max_tokens / figures["seconds"]
            print(f"{replicas} replicas, repeat {repeat + 1}/{args.repeats}: {rate:.0f} tokens/s", file=sys.stderr)
            found.append(figures | {"replicas": replicas, "tokens_per_s": rate})
    return found


def table(records: Sequence[dict[str, Any]], limit: float) -> str:
    """Rates, their share of linear (the median of one replica times their number) and of a device that never waits.

    Args:
        records: of `bench`, all of them.
        limit: tokens/s of one replica whose device is never idle.
    """
    one = median(record["tokens_per_s"] for record in records if record["replicas"] == 1)
    lines = ["| replicas | tokens/s, median [least .. most] | of linear | of the devices' limit |", "|---|---|---|---|"]
    for replicas in dict.fromkeys(record["replicas"] for record in records):
        rates = sorted(record["tokens_per_s"] for record in records if record["replicas"] == replicas)
        middle = median(rates)
        shares = f"{middle / one / replicas:.3f} | {middle / limit / replicas:.3f}"
        lines.append(f"| {replicas} | {middle:.0f} [{rates[0]:.0f} .. {rates[-1]:.0f}] | {shares} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    check_model(args.model, args.tensor_parallel_size)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-replicas-") as name:
        folder = Path(name)
        one_layer_copy(args.model, folder / "model")
        for replicas in args.replicas:
            records += bench(args, replicas, folder)
    print(table(records, args.batch / args.simulate_step_ms * 1e3))
    if args.json is not None:
        args.json.write_text(
            json.dumps({"arguments": vars(args) | {"prompts": None, "json": None}, "records": records})
        )


if __name__ == "__main__":
    main()
