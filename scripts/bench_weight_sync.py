"""How long a weight sync takes: ours, vLLM's reload_weights, saving and loading a file, and the floor, in turns.

    torchrun --nproc_per_node=2 scripts/bench_weight_sync.py --json sync.json
    torchrun --nproc_per_node=2 scripts/bench_weight_sync.py --model random:0.5B
    python scripts/bench_weight_sync.py                                                # one rank, TP=1

The floor copies the bytes that this rank's shard of the engine takes from the policy, into memory that is there
already, and does nothing else. Every rank waits for the others before each turn; a turn lasts until the last of them
is done. Extra memory: the peak of the turn over what was resident before it, the greatest of the ranks' (Linux).
"""

import argparse
import copy
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from rollout import RolloutConfig, RolloutEngine, World, init_world

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # scripts/ is no installed package
from scripts.bench.inputs import random_llama  # noqa: E402

RANDOM_SIZES = {
    "0.5B": {"hidden_size": 1024, "intermediate_size": 4096},
    "1.5B": {"hidden_size": 2048, "intermediate_size": 6144},
}
"""Llamas of about that many parameters, which have the rest in common."""
RANDOM: dict[str, Any] = {
    "vocab_size": 65536,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
LABELS = {
    "ours": "sync_weights",
    "sharded": "sync_weights, the policy in FSDP2's shards",
    "lora": "sync_weights, the policy under LoRA adapters of rank 16",
    "reload": "vLLM's reload_weights",
    "disk": "save a file and reload it",
    "floor": "a plain copy of the same bytes",
}
OTHERS = ("reload", "floor", "ours")  # of which ratios are given


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "models" / "smollm2-135m-tp2"
    sizes = ", ".join(f"random:{size}" for size in RANDOM_SIZES)
    parser.add_argument("--model", default=str(default), help=f"local folder, hub name, or {sizes}")
    parser.add_argument("--policy-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--systems", default=",".join(LABELS), help=f"of {','.join(LABELS)}")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the table there")
    args = parser.parse_args()
    args.systems = args.systems.split(",")
    if unknown := [name for name in args.systems if name not in LABELS]:
        parser.error(f"--systems has {unknown[0]!r}; there are {', '.join(LABELS)}")
    if args.model.startswith("random:") and args.model.removeprefix("random:") not in RANDOM_SIZES:
        parser.error(f"--model is {args.model}; there are {sizes}")
    return args


def model_folder(name: str, scratch: Path, world: World) -> str:
    """The model's folder; a random one is written by the main rank."""
    if not name.startswith("random:"):
        return name
    if world.is_main:
        size = RANDOM_SIZES[name.removeprefix("random:")]
        model = random_llama(**RANDOM, **size)
        model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
        model.save_pretrained(scratch / "model")
    dist.barrier()
    return str(scratch / "model")


def make_systems(engine: RolloutEngine, policy: torch.nn.Module, scratch: Path) -> dict[str, Callable[[], object]]:
    """What each system does in a turn; all ranks call the same."""
    executor = engine._core.executor
    weights = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    saved = scratch / "saved"
    if engine.world.is_main:
        saved.mkdir()
        for file in Path(engine.model).glob("*.json"):
            shutil.copy(file, saved)
    versions = iter(range(1, 10**6))

    def reload() -> None:
        executor.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})

    def disk() -> None:
        if engine.world.is_main:
            state = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
            policy.save_pretrained(saved, state_dict=state)  # type: ignore[operator]
        dist.barrier()
        executor.collective_rpc("reload_weights", kwargs={"weights_path": str(saved)})

    layers = executor.sync_layers()
    parts = [weights[copy.source][copy.source_box] for layer in layers for copy in layer.copies]
    pairs = [(torch.empty(part.shape, dtype=torch.bfloat16), part) for part in parts]

    def floor() -> None:
        for target, source in pairs:
            target.copy_(source)

    sharded = in_shards(engine.model, policy)
    adapted = under_adapters(policy)
    return {
        "ours": lambda: engine.sync_weights(policy, next(versions)),
        "sharded": lambda: engine.sync_weights(sharded, next(versions)),
        "lora": lambda: engine.sync_weights(adapted, next(versions)),
        "reload": reload,
        "disk": disk,
        "floor": floor,
    }


def in_shards(model: str, policy: torch.nn.Module) -> torch.nn.Module:
    """The same policy once more, each rank with its part of every parameter."""
    sharded = AutoModelForCausalLM.from_pretrained(
        model, dtype=next(policy.parameters()).dtype, trust_remote_code=False
    )
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    return sharded


def under_adapters(policy: torch.nn.Module) -> torch.nn.Module:
    """The same policy once more, with an adapter in every linear layer but the head; the same on all ranks."""
    torch.manual_seed(0)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(copy.deepcopy(policy), settings)


def measure(
    systems: dict[str, Callable[[], object]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and extra MiB of each turn, the slowest and the greatest rank's; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    extra: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in (*names[first:], *names[:first]):
            before = reset_peak_memory()
            dist.barrier()
            start = time.perf_counter()
            systems[name]()
            figures = torch.tensor([time.perf_counter() - start, peak_memory() - before], dtype=torch.float64)
            dist.all_reduce(figures, dist.ReduceOp.MAX)
            if repeat:
                seconds[name].append(figures[0].item())
                extra[name].append(figures[1].item())
    return seconds, extra


def reset_peak_memory() -> float:
    """MiB that are resident, from which on the peak counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss / 2**20


def peak_memory() -> float:
    """MiB that were resident at most since `reset_peak_memory`."""
    (kib,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(kib) / 2**10


def rows(seconds: dict[str, list[float]], extra: dict[str, list[float]]) -> list[dict]:
    """A row a system; ratios are paired by round."""
    found = []
    for name, of_system in seconds.items():
        row = {"system": name, "seconds": median(of_system), "least": min(of_system), "greatest": max(of_system)}
        row["extra_mib"] = max(extra[name])
        for other in OTHERS:
            if other in seconds and other != name:
                ratios = [ours / theirs for ours, theirs in zip(of_system, seconds[other], strict=True)]
                row[f"of_{other}"] = median(ratios)
                row[f"of_{other}_range"] = [min(ratios), max(ratios)]
        found.append(row)
    return found


def table(found: list[dict]) -> str:
    lines = [
        "| | seconds | of reload_weights | of the floor | of sync_weights | extra MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [LABELS[row["system"]], f"{row['seconds']:.3f} [{row['least']:.3f} .. {row['greatest']:.3f}]"]
        for other in OTHERS:
            least, greatest = row.get(f"of_{other}_range", (0.0, 0.0))
            cells.append(f"{row[f'of_{other}']:.2f} [{least:.2f} .. {greatest:.2f}]" if f"of_{other}" in row else "")
        cells.append(f"{row['extra_mib']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    transformers.logging.disable_progress_bar()
    world = init_world()
    scratch = [tempfile.mkdtemp(prefix="bench-sync-") if world.is_main else ""]
    dist.broadcast_object_list(scratch, src=0)
    folder = model_folder(args.model, Path(scratch[0]), world)
    policy = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, args.policy_dtype), trust_remote_code=False
    )
    config = RolloutConfig(max_model_len=256, max_num_seqs=8, kv_cache_gib=0.25, enforce_eager=True)
    with RolloutEngine(folder, config) as engine:
        start = time.perf_counter()
        planned = engine.sync_weights(policy, 0).planned
        first = time.perf_counter() - start
        systems = make_systems(engine, policy, Path(scratch[0]))
        seconds, extra = measure({name: systems[name] for name in args.systems}, args.repeats)
        engine.sync_weights(policy, 10**6)
        engine.check_weights(policy)  # whatever the others did, the last sync is right
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    caption = (
        f"{args.model.split('/')[-1]}, {parameters / 1e6:.0f}M parameters, {args.policy_dtype} policy to a bfloat16 "
        f"engine, TP={world.size}; by {'a plan' if planned else 'a reload'}; the first sync, which makes and proves "
        f"the plan, took {first:.1f} s; median [least .. greatest] of {args.repeats} interleaved turns"
    )
    if world.is_main:
        shutil.rmtree(scratch[0])
        print(f"{caption}\n\n{table(rows(seconds, extra))}")
        if args.json:
            whole = {"caption": caption, "first_seconds": first, "planned": planned, "rows": rows(seconds, extra)}
            args.json.write_text(json.dumps(whole, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
