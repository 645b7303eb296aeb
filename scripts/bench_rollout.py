"""Rollout throughput: stock vLLM and this library, synchronous and asynchronous, taking turns on one allocation.

    python scripts/bench_rollout.py --json bench.json --plot bench.png
    python scripts/bench_rollout.py --simulate-step-ms 12 --batch-sizes 512          # a device of 12 ms a step
    python scripts/bench_rollout.py --workload pr23914 --simulate-step-ms 31.6,34.5,42.0,63.4

Every system lives in its own torchrun; all stay alive and take turns, repeat by repeat, in rotating order. Prints the
rates, and ours against theirs paired by repeat. No GPU is needed: on the CPU the model really runs, and
--simulate-step-ms puts a device that takes a set time for every step in its place, which shows the host's share.
"""

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts/ is no installed package

from scripts.bench.inputs import check_model, find_prompts, one_layer_copy  # noqa: E402
from scripts.bench.plan import (  # noqa: E402
    LABELS,
    SYSTEMS,
    WARM_UP_TOKENS,
    WORKLOADS,
    Allocation,
    Settings,
    Turn,
    allocations,
    turns,
)
from scripts.bench.report import make_ratios, make_rows, phase_rate, rates_table, ratios_table  # noqa: E402
from scripts.bench.turns import System, SystemDied, running  # noqa: E402

DEFAULT_MODEL = str(ROOT / "models" / "smollm2-135m-tp2")
GPU_MEMORY = 0.85  # of a GPU, for all systems together


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="local folder or hub name")
    add("--prompts", type=Path, help='JSON lines with the key "problem"; left out: MATH-500')
    add("--workload", choices=sorted(WORKLOADS), default="math500", help="lengths and limits; pr23914: the origin's")
    add("--batch-sizes", type=_integers, help="sequences of all ranks together; left out: the workload's")
    add("--max-tokens", type=int, help="of a response; left out: the workload's")
    add("--max-prompt-tokens", type=int, help="prompts are cut there; left out: the workload's")
    add("--repeats", type=int, default=5)
    add("--tensor-parallel-size", type=int, default=2, help="ranks of each system")
    add("--systems", type=_systems, help=f"of {', '.join(LABELS)}; left out: all but the last")
    add("--simulate-step-ms", type=_numbers, default=[], metavar="MS[,MS...]", help="run on a simulated accelerator")
    add("--enforce-eager", action="store_true", help="no torch.compile and no CUDA graphs")
    add("--json", type=Path, help="write everything there")
    add("--plot", type=Path, help="draw the rates there (PNG)")
    add("--trace", type=Path, help="write the last phase of ours there, for ui.perfetto.dev")
    add("--timeout", type=float, default=1800.0, help="seconds that a start or a turn may take")
    args = parser.parse_args(words)
    _complete(args)
    problem = _problem(args)
    if problem:
        parser.error(problem)
    return args


def _complete(args: argparse.Namespace) -> None:
    """Fill in what the workload and the platform decide."""
    workload = WORKLOADS[args.workload]
    args.batch_sizes = args.batch_sizes or list(workload.batch_sizes)
    args.max_tokens = workload.max_tokens if args.max_tokens is None else args.max_tokens
    args.max_prompt_tokens = args.max_prompt_tokens or workload.max_prompt_tokens
    if args.systems is None:
        args.systems = list(SYSTEMS)
        if not _has_stock_async(args):
            args.systems.remove("stock_async")
            _progress("stock_async is left out: vLLM schedules asynchronously on CUDA only (or --simulate-step-ms)")


def _problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, and what to do; None if nothing is."""
    workload = WORKLOADS[args.workload]
    for flag, value in (
        ("--max-tokens", args.max_tokens),
        ("--repeats", args.repeats),
        ("--tensor-parallel-size", args.tensor_parallel_size),
        *(("--batch-sizes", batch) for batch in args.batch_sizes),
    ):
        if value < 1:
            return f"{flag} is {value}; it must be at least 1"
    if args.model == DEFAULT_MODEL and not Path(DEFAULT_MODEL).is_dir():
        return f"{DEFAULT_MODEL} is not there: run `make model` first, or give --model"
    if args.max_tokens >= workload.max_model_len:
        return (
            f"--max-tokens is {args.max_tokens}; --workload {args.workload} has {workload.max_model_len} tokens for "
            f"prompt and response: give at most {workload.max_model_len - 1}"
        )
    if min(args.simulate_step_ms, default=1.0) <= 0:
        return f"--simulate-step-ms is {min(args.simulate_step_ms):g}; every step takes more than 0 ms"
    if "stock_async" in args.systems and not _has_stock_async(args):
        return "--systems has stock_async, which vLLM offers on CUDA only: leave it out, or add --simulate-step-ms 12"
    for flag, path in (("--json", args.json), ("--plot", args.plot), ("--trace", args.trace)):
        if path is not None and not path.absolute().parent.is_dir():
            return f"{flag} is {path}, in a folder that does not exist: make {path.absolute().parent} first"
    if args.trace is not None and not any(system.startswith("ours_") for system in args.systems):
        return "--trace is of our systems alone: add ours_async to --systems"
    return None


def bench(args: argparse.Namespace, folder: Path) -> tuple[list[dict], dict[str, dict]]:
    """Run every allocation; the records of all counted turns, and what each system said about itself.

    Raises:
        SystemDied: if a system ends or hangs.
        ValueError: if there are no prompts, or the model cannot be run.
    """
    check_model(args.model, args.tensor_parallel_size)
    prompts = find_prompts(args.prompts, folder)
    model = one_layer_copy(args.model, folder / "model") if args.simulate_step_ms else args.model
    records: list[dict] = []
    about: dict[str, dict] = {}
    planned = allocations(args.batch_sizes, args.simulate_step_ms)
    for number, allocation in enumerate(planned):
        settings = [_settings(args, system, allocation, str(model), prompts) for system in args.systems]
        _progress(f"starting {', '.join(args.systems)}" + _of_step(allocation.step_ms))
        with running(settings, folder / f"allocation{number}", args.timeout) as systems:
            about |= {name: said for name, (_, said) in systems.items()}
            for turn in turns(args.systems, allocation.batches, args.repeats):
                trace = number == len(planned) - 1 and turn.last and turn.system == _traced(args)
                figures = _take(systems[turn.system][0], turn, args, args.trace if trace else None)
                if turn.repeat >= 0:
                    record = {"system": turn.system, "batch": turn.batch, "step_ms": allocation.step_ms}
                    record |= {"repeat": turn.repeat, "generated_tokens": turn.batch * args.max_tokens, **figures}
                    records.append(record)
                    rate = f"{phase_rate(record):.0f} tokens/s"
                    _progress(
                        f"batch {turn.batch}{_of_step(allocation.step_ms)}, repeat {turn.repeat + 1}/{args.repeats}, "
                        f"{turn.system}: {rate}, {record['seconds']:.2f} s"
                    )
    return records, about


def _take(system: System, turn: Turn, args: argparse.Namespace, trace: Path | None) -> dict[str, Any]:
    max_tokens = args.max_tokens if turn.repeat >= 0 else min(WARM_UP_TOKENS, args.max_tokens)
    return system.take(batch=turn.batch, max_tokens=max_tokens, trace=str(trace.absolute()) if trace else None)


def _settings(args: argparse.Namespace, system: str, allocation: Allocation, model: str, prompts: Path) -> Settings:
    workload = WORKLOADS[args.workload]
    return Settings(
        system=system,
        model=model,
        prompts=str(prompts),
        tensor_parallel_size=args.tensor_parallel_size,
        max_tokens=args.max_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        max_model_len=workload.max_model_len,
        max_num_seqs=max(workload.max_num_seqs, *allocation.batches),
        largest_batch=max(allocation.batches),
        enforce_eager=args.enforce_eager,
        memory_share=GPU_MEMORY / len(args.systems),
        step_ms=allocation.step_ms,
    )


def caption(args: argparse.Namespace, about: dict[str, dict]) -> str:
    """What the table stands on: machine, versions, workload, and what differs between the systems."""
    one = next(iter(about.values()))
    workload = WORKLOADS[args.workload]
    prompts = args.prompts.name if args.prompts else "MATH-500"
    cut = f"cut at {args.max_prompt_tokens} tokens" if args.max_prompt_tokens else "uncut"
    device = "a simulated accelerator beside " if args.simulate_step_ms else ""
    return (
        f"{device}{one['device']}; vLLM {one['versions']['vllm']}, torch {one['versions']['torch']}, Python "
        f"{one['versions']['python']}; model {Path(args.model).name}, TP={args.tensor_parallel_size}, bfloat16.\n"
        f"Workload {args.workload}: {prompts} prompts {cut}, {args.max_tokens} "
        f"tokens each (ignore_eos), log-probs on, max_model_len {workload.max_model_len}, prefix caching off, "
        f"{'eager' if args.enforce_eager else 'torch.compile'}; median [least .. greatest] of {args.repeats} "
        "interleaved repeats.\n"
        "Stock is LLM.generate as people call it: its default bfloat16 head, texts made. Ours has its default float32 "
        "head and returns token ids and log-probs.\n"
        "tokens/s: of the whole phase, prefill included. decode tokens/s: from the last step with prompt tokens to the "
        "last step. gap: share of the time in which the device had nothing to do."
        + ("\nlimit: batch / step time, a device that is never idle." if args.simulate_step_ms else "")
    )


def _title(args: argparse.Namespace, about: dict[str, dict]) -> str:
    """The picture's, in two lines."""
    device = next(iter(about.values()))["device"]
    return (
        f"{Path(args.model).name}, TP={args.tensor_parallel_size}, {args.max_tokens} tokens a sequence\n"
        f"{'simulated accelerator beside ' if args.simulate_step_ms else ''}{device}; median and range of "
        f"{args.repeats} interleaved repeats"
    )


def report(args: argparse.Namespace, records: list[dict], about: dict[str, dict]) -> None:
    """Print the tables; write the JSON and the picture that were asked for."""
    rows, ratios = make_rows(records, args.tensor_parallel_size, about), make_ratios(records)
    text = caption(args, about)
    print(f"{text}\n\n{rates_table(rows)}")
    if ratios:
        print(f"\nPaired by repeat:\n\n{ratios_table(ratios)}")
    if args.json:
        command = shlex.join(["python", *sys.argv])
        whole = {"command": command, "caption": text, "workload": args.workload, "max_tokens": args.max_tokens}
        whole |= {"max_prompt_tokens": args.max_prompt_tokens, "rows": rows, "ratios": ratios}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    if args.plot:
        from scripts.bench.picture import plot_rates  # matplotlib takes a second to import

        plot_rates(rows, _title(args, about), args.plot)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the systems are ended, too
    folder = Path(tempfile.mkdtemp(prefix="bench-rollout-"))
    try:
        records, about = bench(args, folder)
    except SystemDied as error:
        sys.exit(f"bench_rollout: {error}")  # its message names the folder, which stays
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ValueError):
            sys.exit(f"bench_rollout: {error}")
        if isinstance(error, KeyboardInterrupt):
            sys.exit("bench_rollout: interrupted; every system was ended")
        raise
    shutil.rmtree(folder)
    report(args, records, about)


def _traced(args: argparse.Namespace) -> str | None:
    """The system whose timeline is written: ours, asynchronous if it runs."""
    ours = [system for system in SYSTEMS if system.startswith("ours_") and system in args.systems]
    return ours[-1] if args.trace and ours else None


def _has_stock_async(args: argparse.Namespace) -> bool:
    import torch

    return bool(args.simulate_step_ms) or torch.cuda.is_available()


def _of_step(step_ms: float | None) -> str:
    return "" if step_ms is None else f" at {step_ms:g} ms a step"


def _integers(text: str) -> list[int]:
    return _each(text, int, "whole numbers, such as 32,64")


def _numbers(text: str) -> list[float]:
    return _each(text, float, "numbers, such as 12 or 31.6,34.5")


def _each(text: str, kind: Callable[[str], Any], wanted: str) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {wanted}") from error


def _systems(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in LABELS:
            raise argparse.ArgumentTypeError(f"{name!r} is no system; there are {', '.join(LABELS)}")
    return names


def _progress(line: str) -> None:
    print(f"bench_rollout: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
