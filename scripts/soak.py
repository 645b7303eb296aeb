"""Two thousand phases of generation and weight sync in one life of the engine: no error, and nothing that grows.

    torchrun --nproc_per_node=2 scripts/soak.py --json soak.json
    torchrun --nproc_per_node=2 scripts/soak.py --phases 60 --settled 20

A small random model; batch sizes, prompt and response lengths, stop tokens, temperatures and weights are drawn anew for
every phase, and the KV cache is too small for the larger batches, so that sequences are preempted. Every rank compares
its memory, file descriptors and threads at the end with those at the `settled` phase. Exit code 1 if any of them grew.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, init_world, watched

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/ is no installed package
from scripts.bench.inputs import SMALL_LLAMA, random_llama  # noqa: E402

VOCABULARY = 512
ENGINE = RolloutConfig(
    dtype="float32",
    max_model_len=128,
    max_num_seqs=64,
    block_size=32,
    kv_cache_gib=0.001,  # 65 blocks of 32 tokens; 64 sequences of up to 4 blocks do not fit
    enforce_eager=True,
)


@dataclass(frozen=True)
class Sample:
    """What one rank held after a phase.

    Attributes:
        memory: resident, in bytes.
        descriptors: open files and sockets.
    """

    phase: int
    seconds: float
    memory: int
    descriptors: int
    threads: int
    sequences: int
    tokens: int
    stopped: int
    preemptions: int


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", type=int, default=2000)
    parser.add_argument("--settled", type=int, default=200, help="the phase from which on nothing may grow")
    parser.add_argument("--growth", type=float, default=0.02, help="share by which the resident memory may grow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every phase of every rank there")
    args = parser.parse_args()
    if not 0 < args.settled < args.phases:
        parser.error(f"--settled is {args.settled}; it must be above 0 and below --phases, {args.phases}")
    return args


def run_phase(engine: RolloutEngine, policy: LlamaForCausalLM, phase: int, args: argparse.Namespace) -> Sample:
    """New weights, a sync, a batch; whatever is the same on all ranks is drawn from the phase's own generator."""
    start = time.perf_counter()
    shared, own = (
        np.random.default_rng((args.seed, phase)),
        np.random.default_rng((args.seed, phase, engine.world.rank)),
    )
    noise = torch.Generator().manual_seed(phase)
    with torch.no_grad():
        for parameter in policy.parameters():
            # A random walk that stays near the size it began with.
            parameter.mul_(0.98).add_(torch.randn(parameter.shape, generator=noise), alpha=0.04)
    engine.sync_weights(policy, version=phase)
    sampling = SamplingConfig(
        temperature=float(shared.choice([0.0, 0.7, 1.0, 1.3])),
        top_k=int(shared.choice([0, 0, 0, 20])),
        max_tokens=int(shared.integers(1, 80)),
        n=int(shared.integers(1, 5)),
        stop_token_ids=shared.choice(VOCABULARY, int(shared.integers(0, 40)), replace=False).tolist(),
    )
    lengths = own.integers(1, 48, int(own.integers(0, 40)))
    batch = engine.generate([own.integers(3, VOCABULARY, length).tolist() for length in lengths], sampling)
    assert batch.version == phase and len(batch) == len(lengths) * sampling.n
    process = psutil.Process()
    return Sample(
        phase=phase,
        seconds=time.perf_counter() - start,
        memory=process.memory_info().rss,
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        sequences=len(batch),
        tokens=int(batch.response_lengths.sum()),
        stopped=int(batch.finished.sum()),
        preemptions=int(engine.metrics["rollout/preemptions"]),
    )


def growth(rank: int, samples: list[Sample], settled: int, allowed: float) -> list[str]:
    """What grew on one rank since it had settled."""
    first, last = samples[settled - 1], samples[-1]
    found = []
    if last.memory > first.memory * (1 + allowed):
        found.append(f"rank {rank}: memory grew from {first.memory / 2**20:.1f} to {last.memory / 2**20:.1f} MiB")
    for name in ("descriptors", "threads"):
        if getattr(last, name) > getattr(first, name):
            found.append(f"rank {rank}: {name} grew from {getattr(first, name)} to {getattr(last, name)}")
    return found


def table(everyones: list[list[Sample]], settled: int) -> str:
    """A line for a few phases of each rank."""
    lines = ["| rank | phase | resident MiB | descriptors | threads |", "|---|---|---|---|---|"]
    for rank, samples in enumerate(everyones):
        marks = np.unique(np.linspace(settled, len(samples), 5).astype(int))
        for sample in (samples[mark - 1] for mark in (1, *marks)):
            memory = f"{sample.memory / 2**20:.1f}"
            lines.append(f"| {rank} | {sample.phase + 1} | {memory} | {sample.descriptors} | {sample.threads} |")
    return "\n".join(lines)


def summary(samples: list[Sample]) -> str:
    sequences, tokens, stopped = (sum(getattr(s, name) for s in samples) for name in ("sequences", "tokens", "stopped"))
    preemptions, seconds = sum(s.preemptions for s in samples), sum(s.seconds for s in samples)
    return (
        f"{len(samples)} phases in {seconds:.0f} s; rank 0's share: {sequences} sequences, {tokens} tokens, {stopped} "
        f"ended early; {preemptions} preemptions"
    )


def main() -> None:
    args = arguments()
    world = init_world()
    policy = random_llama(vocab_size=VOCABULARY, tie_word_embeddings=False, **SMALL_LLAMA)
    folder = [tempfile.mkdtemp(prefix="soak-") if world.is_main else ""]
    if world.is_main:
        policy.save_pretrained(folder[0])
    dist.broadcast_object_list(folder, src=0)
    samples: list[Sample] = []
    with watched(stall_timeout_s=ENGINE.stall_timeout_s), RolloutEngine(folder[0], ENGINE) as engine:
        for phase in range(args.phases):
            samples.append(run_phase(engine, policy, phase, args))
            if world.is_main and (phase + 1) % 100 == 0:
                memory = f"{samples[-1].memory / 2**20:.1f} MiB"
                print(f"soak: phase {phase + 1}/{args.phases}, {memory} on rank 0", file=sys.stderr, flush=True)
    everyones: list = [None] * world.size
    dist.all_gather_object(everyones, samples)
    found = [
        each for rank, of_rank in enumerate(everyones) for each in growth(rank, of_rank, args.settled, args.growth)
    ]
    if world.is_main:
        shutil.rmtree(folder[0])
        print(f"{table(everyones, args.settled)}\n{summary(samples)}")
        print("\n".join(found) if found else "nothing grew")
        if args.json:
            args.json.write_text(json.dumps([[asdict(sample) for sample in of_rank] for of_rank in everyones]) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
