"""A whole GRPO step beside TRL's on the same work, run in turns: seconds by phase, and the peak memory of a rank.

    python scripts/bench_step.py --peer PATH/trl_grpo_step.py [--peer-site FOLDER] [--pairs 3] [--json FILE]

The work: 128 completions of exactly 64 tokens, 8 a prompt, sums of two numbers, one update, two ranks, the default
model. TRL 1.16 colocates vLLM in the trainer's ranks too; its script (--peer) prints its own step_time and two phases.
Each run starts anew; its first step, which warms up, is not counted. Peak memory: the largest resident set of a rank
from start to end, vLLM included, as the kernel keeps it (VmHWM).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 1800.0
LOOK_EVERY_S = 0.5
PHASES = ("generate", "sync", "train")
CONFIG = [
    "sampling.max_tokens=64", "sampling.ignore_eos=true", "sampling.n=8", "grpo.prompts_per_step=16",
    "rollout.max_model_len=512", "rollout.max_num_seqs=128", "data.shuffle=false", "optimizer.learning_rate=1e-5",
    "run.progress=false", "run.name=run", "wandb.mode=disabled",
]  # fmt: skip


@dataclass
class Run:
    """One start of a system.

    Attributes:
        steps: seconds of each step but the first.
        phases: the same of each phase; train is what is left of the step.
        peak_gib: of the rank with the most.
    """

    steps: list[float]
    phases: dict[str, list[float]] = field(default_factory=dict)
    peak_gib: float = 0.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-tp2"))
    parser.add_argument("--peer", type=Path, help="TRL's script; without it only ours runs")
    parser.add_argument("--peer-site", type=Path, help="a folder that trl was installed into, if not beside ours")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="that count, of each run")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of ours")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("overrides", nargs="*", help="of our config, as section.key=value")
    args = parser.parse_args()
    if args.peer and not args.peer.is_file():
        parser.error(f"--peer is {args.peer}, which is not a file")
    return args


def write_sums(file: Path, rows: int = 512) -> None:
    """The same problems as TRL's script asks."""
    rng = random.Random(0)
    pairs = [(rng.randint(1, 50), rng.randint(1, 50)) for _ in range(rows)]
    questions = ({"question": f"What is {a}+{b}? Answer with only the number.", "answer": str(a + b)} for a, b in pairs)
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))


def run_ours(args: argparse.Namespace, folder: Path) -> Run:
    write_sums(folder / "sums.jsonl")
    words = [str(ROOT / "scripts" / "grpo.py"), *CONFIG, f"model.path={args.model}", f"grpo.steps={args.steps + 1}"]
    words += [f"data.source={folder / 'sums.jsonl'}", f"run.directory={folder}"]
    words += [f"grpo.micro_batch_tokens={args.micro_batch_tokens}", *args.overrides]
    _, peak = torchrun(words, folder)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    return with_rest([row["step/seconds"] for row in rows], [row["phase/generate_s"] for row in rows],
                     [row["phase/sync_s"] for row in rows], peak)  # fmt: skip


def run_trl(args: argparse.Namespace, folder: Path) -> Run:
    words = [str(args.peer), "--model", args.model, "--steps", str(args.steps + 1), "--output-dir", str(folder / "out")]
    printed, peak = torchrun(words, folder, args.peer_site)
    (found,) = (json.loads(line) for line in printed.splitlines() if line.startswith('{"system"'))
    return with_rest(found["step_s"][1:], found["generate"][1:], found["sync_weights"][1:], peak)


def with_rest(steps: list[float], generate: list[float], sync: list[float], peak: float) -> Run:
    train = [whole - one - two for whole, one, two in zip(steps, generate, sync, strict=True)]
    return Run(steps, dict(zip(PHASES, (generate, sync, train), strict=True)), peak)


def torchrun(words: list[str], folder: Path, site: Path | None = None, ranks: int = 2) -> tuple[str, float]:
    """Run it; returns what it printed, and the peak GiB of a rank.

    Raises:
        RuntimeError: if it fails; with the end of its output.
        TimeoutError: if it is not done in time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *words]
    paths = [str(site) if site else "", os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    peak, deadline = 0.0, time.monotonic() + TIMEOUT_S
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        try:
            while process.poll() is None:
                peak = max(peak, peak_of_ranks(process.pid))
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{words[0]} was not done in {TIMEOUT_S:.0f} s")
                time.sleep(LOOK_EVERY_S)
        finally:
            process.terminate()  # torchrun ends its ranks
            process.wait()
        output.seek(0)
        printed = output.read()
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with exit code {process.returncode}:\n{printed[-3000:]}")
    return printed, peak


def peak_of_ranks(launcher: int) -> float:
    """GiB, of the child with the largest resident set so far."""
    peaks = [0.0]
    for rank in psutil.Process(launcher).children():
        try:
            lines = Path(f"/proc/{rank.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        peaks += [int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")]
    return max(peaks)


def rows(runs: dict[str, list[Run]]) -> list[dict]:
    """A row a system and phase: median and range over all counted steps of all runs."""
    found = []
    for name, of_system in runs.items():
        parts = {"step": [second for run in of_system for second in run.steps]}
        parts |= {phase: [second for run in of_system for second in run.phases[phase]] for phase in PHASES}
        peak = max(run.peak_gib for run in of_system)
        for part, seconds in parts.items():
            row = {"system": name, "part": part, "seconds": median(seconds), "range": [min(seconds), max(seconds)]}
            found.append(row | {"peak_gib": peak})
    return found


def table(found: list[dict], ratios: list[float]) -> str:
    lines = ["| system | step | generate | sync | train | peak GiB of a rank |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row["system"] for row in found):
        of_system = [row for row in found if row["system"] == name]
        cells = [f"{row['seconds']:.2f} [{row['range'][0]:.2f} .. {row['range'][1]:.2f}]" for row in of_system]
        lines.append(f"| {name} | {' | '.join(cells)} | {of_system[0]['peak_gib']:.1f} |")
    if ratios:
        spread = f"{median(ratios):.2f} [{min(ratios):.2f} .. {max(ratios):.2f}]"
        lines += ["", f"Our step / TRL's, medians of {len(ratios)} pairs of runs: {spread}"]
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the ranks are ended, too
    systems = {"ours": run_ours} | ({"TRL": run_trl} if args.peer else {})
    runs: dict[str, list[Run]] = {name: [] for name in systems}
    for pair in range(args.pairs):
        for name in list(systems)[:: -1 if pair % 2 else 1]:  # neither is always the first
            with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
                run = systems[name](args, Path(folder))
            runs[name].append(run)
            print(f"{name}: {median(run.steps):.2f} s a step, peak {run.peak_gib:.1f} GiB", file=sys.stderr, flush=True)
    ratios = []
    if args.peer:
        pairs = zip(runs["ours"], runs["TRL"], strict=True)
        ratios = [median(ours.steps) / median(theirs.steps) for ours, theirs in pairs]
    print(table(rows(runs), ratios))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows(runs), "of_trl": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
