"""Asynchronous against synchronous scheduling on this machine: the same tokens, and how much work was hidden.

    torchrun --nproc_per_node=2 scripts/compare_schedules.py [--model DIR] [--sequences 512] [--max-tokens 64]

Builds one engine after the other, generates with the same seed, and prints a line for each: what really ran, seconds,
tokens a second, the share of the main thread's work that ran behind the model, and a digest of all tokens and log-probs
of the tensor-parallel group. Exit code 1 if a digest differs between ranks or schedules.
"""

import argparse
import sys

import torch.distributed as dist

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, overlap_fraction


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-tp2", help="local folder or hub name")
    parser.add_argument("--sequences", type=int, default=512, help="of all ranks together")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a response")
    parser.add_argument("--ignore-eos", action="store_true", help="run every response to --max-tokens")
    parser.add_argument("--enforce-eager", action="store_true", help="no torch.compile and no CUDA graphs")
    return parser.parse_args()


def run(args: argparse.Namespace, asynchronous: bool) -> str:
    """Generate once, print a line, and return the group's digest."""
    config = RolloutConfig(
        max_model_len=args.max_tokens + 64,
        max_num_seqs=args.sequences,
        kv_cache_gib=4.0,
        async_scheduling=asynchronous,
        enforce_eager=args.enforce_eager,
    )
    with RolloutEngine(args.model, config) as engine:
        share = args.sequences // engine.world.size
        numbers = range(engine.world.rank * share, (engine.world.rank + 1) * share)
        prompts = [f"Question {number}: what is {number} times {number % 7}? Answer:" for number in numbers]
        sampling = SamplingConfig(max_tokens=args.max_tokens, ignore_eos=args.ignore_eos)
        engine.generate(prompts[:2], SamplingConfig(max_tokens=2))  # compiles
        engine.generate(prompts, sampling, seed=1)
        ran, metrics = engine.describe(), engine.metrics
        print(
            f"rank {engine.world.rank} of {engine.world.size}, {ran['scheduler']}, queue of {ran['queue_depth']}: "
            f"{metrics['rollout/generated_tokens']} tokens in {metrics['rollout/seconds']:.1f} s, "
            f"{metrics['rollout/generated_tokens_per_s']:.0f} tokens/s, "
            f"overlap {overlap_fraction(engine.timeline) or 0.0:.3f}, digest {engine.digest()[:12]}",
            flush=True,
        )
        return engine.digest()


def main() -> None:
    args = arguments()
    digests = [run(args, asynchronous) for asynchronous in (True, False)]
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, digests)
    same = len({digest for of_rank in everyones for digest in of_rank}) == 1
    if dist.get_rank() == 0:
        print("same tokens and log-probs on every rank, both schedules" if same else f"DIGESTS DIFFER: {everyones}")
    dist.destroy_process_group()
    sys.exit(not same)


if __name__ == "__main__":
    main()
