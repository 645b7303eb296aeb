"""Asynchronous against synchronous scheduling on this machine: the same tokens, the work that was hidden, the speed.

    torchrun --nproc_per_node=2 scripts/compare_schedules.py [--model DIR] [--sequences 512] [--max-tokens 64]
    torchrun --nproc_per_node=2 scripts/compare_schedules.py --sequences 32,512 --ignore-eos --repeats 8
    torchrun --nproc_per_node=2 scripts/compare_schedules.py --sequences 32,512 --ignore-eos --repeats 8 --same-engine

Builds one engine after the other, generates with the same seed, and prints a line for each batch: what really ran,
seconds, tokens a second, the share of the main thread's work that ran behind the model, and a digest of all tokens and
log-probs of the tensor-parallel group. Exit code 1 if a digest differs between ranks, schedules or repeats.

With --repeats the schedules take turns, each time in engines of their own: an engine keeps its luck (where its memory
lies) for its life, and repeats within one would not average it out. Where that luck is larger than the difference,
--same-engine takes it out instead: one engine, built asynchronous, which in every other phase waits for a step before
it schedules the next. At the end a table: medians, and ratios paired by repeat.
"""

import argparse
import sys
from dataclasses import replace
from statistics import median

import torch.distributed as dist

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, overlap_fraction

Batch = tuple[int, str, float]
"""Sequences, the digest, tokens a second of the phase."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-tp2", help="local folder or hub name")
    parser.add_argument("--sequences", default="512", help="of all ranks together; several with commas between")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a response")
    parser.add_argument("--ignore-eos", action="store_true", help="run every response to --max-tokens")
    parser.add_argument("--enforce-eager", action="store_true", help="no torch.compile and no CUDA graphs")
    parser.add_argument("--repeats", type=int, default=1, help="of each schedule")
    parser.add_argument("--same-engine", action="store_true", help="one for both schedules and all repeats")
    return parser.parse_args()


def sizes(args: argparse.Namespace) -> list[int]:
    return [int(size) for size in args.sequences.split(",")]


def build(args: argparse.Namespace, asynchronous: bool) -> RolloutEngine:
    """An engine for the largest batch; nothing is compiled yet."""
    config = RolloutConfig(
        max_model_len=args.max_tokens + 64,
        max_num_seqs=max(sizes(args)),
        kv_cache_gib=4.0,
        async_scheduling=asynchronous,
        enforce_eager=args.enforce_eager,
    )
    return RolloutEngine(args.model, config)


def compile_steps(engine: RolloutEngine) -> None:
    engine.generate(["A first question:"] * 2, SamplingConfig(max_tokens=2))


def in_engines_of_their_own(args: argparse.Namespace) -> dict[bool, list[list[Batch]]]:
    """All batches, repeat by repeat, for asynchronous True and False."""
    found: dict[bool, list[list[Batch]]] = {True: [], False: []}
    for repeat in range(args.repeats):
        for asynchronous in orders(repeat):
            with build(args, asynchronous) as engine:
                compile_steps(engine)
                found[asynchronous].append([generate(engine, args, size) for size in sizes(args)])
    return found


def in_the_same_engine(args: argparse.Namespace) -> dict[bool, list[list[Batch]]]:
    """As above; the two phases of a pair follow each other."""
    found: dict[bool, list[list[Batch]]] = {True: [], False: []}
    with build(args, True) as engine:
        compile_steps(engine)
        for repeat in range(args.repeats):
            for asynchronous in (True, False):
                found[asynchronous].append([])
            for size in sizes(args):
                for asynchronous in orders(repeat):
                    # No setting: an engine's users have no reason to change it between two phases.
                    engine._core = replace(engine._core, queue_depth=2 if asynchronous else 1)
                    found[asynchronous][-1].append(generate(engine, args, size))
    return found


def orders(repeat: int) -> tuple[bool, bool]:
    """Who goes first changes from repeat to repeat."""
    return (True, False) if repeat % 2 == 0 else (False, True)


def generate(engine: RolloutEngine, args: argparse.Namespace, size: int) -> Batch:
    share = size // engine.world.size
    numbers = range(engine.world.rank * share, (engine.world.rank + 1) * share)
    prompts = [f"Question {number}: what is {number} times {number % 7}? Answer:" for number in numbers]
    sampling = SamplingConfig(max_tokens=args.max_tokens, ignore_eos=args.ignore_eos)
    engine.generate(prompts, sampling, seed=1)
    ran, metrics = engine.describe(), engine.metrics
    rate = metrics["rollout/generated_tokens_per_s"]
    print(
        f"rank {engine.world.rank} of {engine.world.size}, {ran['scheduler']}, queue of {ran['queue_depth']}: "
        f"{metrics['rollout/generated_tokens']} tokens in {metrics['rollout/seconds']:.1f} s, {rate:.0f} tokens/s, "
        f"overlap {overlap_fraction(engine.timeline) or 0.0:.3f}, digest {engine.digest()[:12]}",
        flush=True,
    )
    return size, engine.digest(), rate


def table(synchronous: list[list[Batch]], asynchronous: list[list[Batch]]) -> str:
    """Median [least .. greatest] of each batch; ratios are of two neighbours in time.

    >>> print(table([[(2, "", 10.0)], [(2, "", 8.0)]], [[(2, "", 11.0)], [(2, "", 8.0)]]))
    | sequences | synchronous, tokens/s | asynchronous | asynchronous / synchronous |
    |---|---|---|---|
    | 2 | 9 [8 .. 10] | 10 [8 .. 11] | 1.05 [1.00 .. 1.10] |
    """
    lines = [
        "| sequences | synchronous, tokens/s | asynchronous | asynchronous / synchronous |",
        "|---|---|---|---|",
    ]
    for column, (size, _, _) in enumerate(synchronous[0]):
        rates = [[repeat[column][2] for repeat in of_one] for of_one in (synchronous, asynchronous)]
        ratios = [fast / slow for slow, fast in zip(*rates, strict=True)]
        cells = [f"{median(each):.0f} [{min(each):.0f} .. {max(each):.0f}]" for each in rates]
        lines.append(
            f"| {size} | {' | '.join(cells)} | {median(ratios):.2f} [{min(ratios):.2f} .. {max(ratios):.2f}] |"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    found = in_the_same_engine(args) if args.same_engine else in_engines_of_their_own(args)
    everyones: list = [None] * dist.get_world_size()
    digests = {(size, digest) for of_one in found.values() for batches in of_one for size, digest, _ in batches}
    dist.all_gather_object(everyones, digests)
    same = len(set.union(*everyones)) == len(sizes(args))
    if dist.get_rank() == 0:
        if args.repeats > 1:
            print(table(found[False], found[True]))
        print("same tokens and log-probs on every rank, both schedules" if same else f"DIGESTS DIFFER: {everyones}")
    dist.destroy_process_group()
    sys.exit(not same)


if __name__ == "__main__":
    main()
