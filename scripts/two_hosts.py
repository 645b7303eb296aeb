"""PPO over two hosts: the same numbers as on one; what a cut cable and a dead host cost. Linux, as root; no GPU.

    python scripts/two_hosts.py --json two_hosts.json                  # all of it, some ten minutes on two cores
    python scripts/two_hosts.py --folder OUT --only one_host,two_hosts # what is there already is not run again

The hosts are network namespaces on this machine (scripts/bench/hosts.py), two ranks each, tensor-parallel inside a
host, with a real engine and a tiny random model, on storage that both see. Rows are compared by all that is no time,
rate or memory.

- one_host: four ranks on one host, as a measure for the others.
- two_hosts: the same job over both.
- cut: the cable is pulled out for five seconds in the middle of a step.
- killed: the second host dies (cable first, so that nobody is told) and comes back; checkpoints are a step apart.
- first_killed: the first host dies, on which torchrun's rendezvous is; then all is started again, by the same commands.
- shrunk: the second host dies and stays dead, and torchrun was told that one is enough.
- refused: a copy of the engine over both hosts; checkpoints into a folder that only the first one has.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts/ is no installed package

from scripts.bench.hosts import Host, NoHosts, two_hosts, wait_for  # noqa: E402
from scripts.bench.inputs import SMALL_LLAMA, random_llama  # noqa: E402

TOKENIZER = ROOT / "models" / "smollm2-135m-tp2"
PORT = 29400
STEPS = 4
CUT_S, DOWN_S = 5.0, 3.0
STALL_S = 40.0
LAST_CALL_S = 10  # how long torchrun waits for further hosts once there are enough
TIMEOUT_S = 220.0
SETTINGS = [
    "configs/smoke.yaml",
    f"ppo.steps={STEPS}",
    "optimizer.learning_rate=1e-3",
    "rollout.tensor_parallel_size=2",
    f"rollout.stall_timeout_s={STALL_S:g}",
    "run.name=run",
]
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # docs/multi-node.md says why
    "PYTHONPATH": str(ROOT),
}
# Times, rates and memory: all that may differ.
MEASURED = re.compile(
    r"phase/.*|memory/.*|rank/.*|(.*/)?seconds|.*_per_s|.*_ms|rollout/(host_gap|tail)_fraction|rollout/imbalance"
)


class Job:
    """The training run, on one host or on both.

    Args:
        hosts: that it runs on, the first with torchrun's rendezvous.
        ranks: of each host.
        words: settings beside SETTINGS.
        restarts: that torchrun may make.
        shared: False hides the folder from the second host.
        least: hosts that are enough to go on; None takes all.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        ranks: int,
        model: Path,
        folder: Path,
        *words: str,
        restarts: int = 3,
        shared: bool = True,
        least: int | None = None,
    ) -> None:
        self._hosts, self._ranks, self._folder, self._restarts = hosts, ranks, folder, restarts
        self._shared, self._nodes = shared, f"{least or len(hosts)}:{len(hosts)}"
        self._words = [*SETTINGS, f"model.path={model}", f"run.directory={folder}", *words]
        folder.mkdir(parents=True)
        self.metrics = folder / "run" / "metrics.jsonl"
        self.processes = [self.start(host) for host in hosts]

    def start(self, host: Host) -> subprocess.Popen:
        """The same command on each host, but for its own address and whether the rendezvous is here."""
        first = self._hosts[0]
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={self._nodes}"]
        launcher += [f"--nproc-per-node={self._ranks}", f"--max-restarts={self._restarts}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-id=job"]
        launcher += [f"--rdzv-endpoint={first.address}:{PORT}", f"--local-addr={host.address}"]
        launcher += [f"--rdzv-conf=is_host={str(host is first).lower()},last_call_timeout={LAST_CALL_S}"]
        hides = host is not first and not self._shared
        hidden = ["bash", "-c", f'mount -t tmpfs tmpfs "{self._folder}" && exec "$@"', "hidden"] if hides else []
        return host.start([*hidden, *launcher, "scripts/ppo.py", *self._words], self.log(host), VARIABLES)

    def log(self, host: Host) -> Path:
        """What all ranks of the host have said."""
        return self._folder / f"{host.name.partition('-')[0]}.log"

    def wait(self, processes: Sequence[subprocess.Popen] | None = None) -> list[int]:
        """For the end of all hosts' torchruns; their exit codes."""
        deadline = time.monotonic() + TIMEOUT_S
        return [each.wait(max(deadline - time.monotonic(), 0.1)) for each in processes or self.processes]

    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, without times, rates and memory."""
        rows = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return [{name: value for name, value in row.items() if not MEASURED.fullmatch(name)} for row in rows]


def one_host(hosts: Sequence[Host], model: Path, folder: Path) -> dict[str, Any]:
    job = Job(hosts[:1], 4, model, folder)
    return {"exit": job.wait(), "rows": job.rows()}


def both(hosts: Sequence[Host], model: Path, folder: Path) -> dict[str, Any]:
    before = [host.sent_bytes for host in hosts]
    job = Job(hosts, 2, model, folder)
    codes = job.wait()
    return {
        "exit": codes,
        "rows": job.rows(),
        "sent_bytes": [h.sent_bytes - b for h, b in zip(hosts, before, strict=True)],
    }


def cut(hosts: Sequence[Host], model: Path, folder: Path) -> dict[str, Any]:
    job = Job(hosts, 2, model, folder)
    wait_for(job.metrics, 1, TIMEOUT_S, job.processes)
    hosts[1].cut()
    before = len(job.rows())
    time.sleep(CUT_S)
    meanwhile = len(job.rows()) - before
    hosts[1].mend()
    mended = time.monotonic()
    wait_for(job.metrics, before + meanwhile + 1, TIMEOUT_S, job.processes)
    seconds = time.monotonic() - mended
    return {"exit": job.wait(), "rows": job.rows(), "steps_while_cut": meanwhile, "next_step_after_s": seconds}


def killed(hosts: Sequence[Host], model: Path, folder: Path) -> dict[str, Any]:
    job = Job(hosts, 2, model, folder, "checkpoint.every=1")
    wait_for(job.metrics, 2, TIMEOUT_S, job.processes)
    hosts[1].cut()
    hosts[1].kill()
    died = time.monotonic()
    time.sleep(DOWN_S)
    hosts[1].mend()
    again = job.start(hosts[1])
    seen = job.metrics.read_bytes().count(b"\n")
    wait_for(job.metrics, seen + 1, TIMEOUT_S, [job.processes[0], again])
    seconds = time.monotonic() - died
    stories = [json.loads(file.read_text())["error"] for file in (folder / "run").glob("failure-before-*.json")]
    codes = job.wait([job.processes[0], again])
    return {"exit": codes, "rows": job.rows(), "next_step_after_s": seconds, "said": [each[:120] for each in stories]}


def first_killed(hosts: Sequence[Host], model: Path, folder: Path) -> dict[str, Any]:
    job = Job(hosts, 2, model, folder, "checkpoint.every=1", "checkpoint.resume=auto")
    wait_for(job.metrics, 2, TIMEOUT_S, job.processes)
    hosts[0].kill()
    died = time.monotonic()
    left = job.processes[1].wait(TIMEOUT_S)
    ended = time.monotonic() - died
    codes = job.wait([job.start(host) for host in hosts])
    return {"exit": codes, "rows": job.rows(), "left_exit": left, "left_ended_after_s": ended}


def shrunk(hosts: Sequence[Host], model: Path, folder: Path) -> dict[str, Any]:
    job = Job(hosts, 2, model, folder, "checkpoint.every=1", least=1)
    wait_for(job.metrics, 2, TIMEOUT_S, job.processes)
    before = {row["step"] for row in job.rows()}
    hosts[1].kill()
    died = time.monotonic()
    wait_for(job.metrics, len(before) + 1, TIMEOUT_S, job.processes[:1])
    seconds = time.monotonic() - died
    return {"exit": job.wait(job.processes[:1]), "rows": job.rows(), "next_step_after_s": seconds}


def refused(hosts: Sequence[Host], model: Path, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, words, shared in (
        ("across", ["rollout.tensor_parallel_size=4"], True),
        ("unshared", ["checkpoint.every=1"], False),
    ):
        start = time.monotonic()
        job = Job(hosts, 2, model, folder / name, *words, restarts=0, shared=shared)
        codes = job.wait()
        (said,) = {line for line in job.log(hosts[0]).read_text().splitlines() if line.startswith("error: ")}
        result[name] = {"exit": codes, "said": said, "seconds": time.monotonic() - start}
    return result


SCENARIOS: dict[str, Callable[[Sequence[Host], Path, Path], dict[str, Any]]] = {
    "one_host": one_host,
    "two_hosts": both,
    "cut": cut,
    "killed": killed,
    "first_killed": first_killed,
    "shrunk": shrunk,
    "refused": refused,
}


def tiny_model(folder: Path) -> Path:
    """A random two-layer Llama with the default model's tokenizer: it starts fast and talks nonsense."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, trust_remote_code=False)
    shape = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, **SMALL_LLAMA}
    random_llama(eos_token_id=tokenizer.eos_token_id, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(name: str, model: Path, folder: Path) -> dict[str, Any]:
    """One scenario, on hosts of its own; its result is kept in FOLDER/NAME.json, with the seconds that it took.

    Raises:
        NoHosts: where no hosts can be made.
    """
    kept = folder / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    shutil.rmtree(folder / name, ignore_errors=True)
    start = time.monotonic()
    with two_hosts() as hosts:
        result = SCENARIOS[name](hosts, model, folder / name)
    result["seconds"] = time.monotonic() - start
    kept.write_text(json.dumps(result))
    return result


def differing(rows: Sequence[dict[str, Any]], measure: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By name: the largest relative difference from the other run's rows; nothing where all digits are the same.

    >>> differing([{"step": 0, "train/loss": 1.0}], [{"step": 0, "train/loss": 1.25}])
    {'train/loss': 0.2}
    """
    found: dict[str, float] = {}
    if [row["step"] for row in rows] != [row["step"] for row in measure]:
        raise ValueError(f"steps {[row['step'] for row in rows]} against {[row['step'] for row in measure]}")
    for row, other in zip(rows, measure, strict=True):
        for name in row.keys() | other.keys():
            if row.get(name) != other.get(name):
                mine, theirs = float(row.get(name, "inf")), float(other.get(name, "inf"))
                apart = abs(mine - theirs) / max(abs(mine), abs(theirs))
                found[name] = max(found.get(name, 0.0), apart)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SCENARIOS), help=", ".join(SCENARIOS))
    parser.add_argument("--folder", type=Path, help="for the model, the runs and their logs; left out: a temporary one")
    parser.add_argument("--json", type=Path, help="write everything there")
    args = parser.parse_args()
    if unknown := set(args.only) - SCENARIOS.keys():
        parser.error(f"--only has {', '.join(sorted(unknown))}; give some of {', '.join(SCENARIOS)}")
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="two-hosts-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not (model / "config.json").exists():
        tiny_model(model)
    try:
        results = {name: run(name, model, folder) for name in args.only}
    except NoHosts as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| scenario | exit codes | steps | differs from one host's | seconds | |")
    print("|---|---|---|---|---|---|")
    for name, result in results.items():
        if name == "refused":
            continue
        rows = result["rows"]
        apart = differing(rows, results["one_host"]["rows"]) if "one_host" in results else {}
        largest = max(apart.values(), default=0.0)
        said = f"{len(apart)} of {len(rows[0])} names, by at most {largest:.1e}" if apart else "in no digit"
        more = {key: value for key, value in result.items() if key not in ("exit", "rows", "seconds")}
        told = ", ".join(
            f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in more.items()
        )
        print(f"| {name} | {result['exit']} | {len(rows)} | {said} | {result['seconds']:.0f} | {told} |")
    for name, result in results.get("refused", {}).items():
        if name != "seconds":
            print(f"\nrefused after {result['seconds']:.0f} s, exit codes {result['exit']}: {result['said']}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
