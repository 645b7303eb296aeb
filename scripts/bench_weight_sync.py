"""How long a weight sync takes: ours, vLLM's reload_weights, saving and loading a file, and the floor, in turns.

    torchrun --nproc_per_node=2 scripts/bench_weight_sync.py --json sync.json
    torchrun --nproc_per_node=2 scripts/bench_weight_sync.py --model random:0.5B
    python scripts/bench_weight_sync.py                                                # one rank, TP=1

The floor copies the bytes that this rank's shard of the engine takes from the policy, into memory that is there
already, and does nothing else. Every rank waits for the others before each turn; a turn lasts until the last of them
is done.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rollout import RolloutConfig, RolloutEngine, World, init_world

ROOT = Path(__file__).resolve().parents[1]
# Hidden size, layers, heads, key-value heads, intermediate size, vocabulary: Llamas of about that many parameters.
RANDOM_SIZES = {
    "0.5B": (1024, 24, 16, 4, 4096, 65536),
    "1.5B": (2048, 24, 16, 4, 6144, 65536),
}
LABELS = {
    "ours": "sync_weights",
    "reload": "vLLM's reload_weights",
    "disk": "save a file and reload it",
    "floor": "a plain copy of the same bytes",
}


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
    hidden, layers, heads, kv_heads, intermediate, vocabulary = RANDOM_SIZES[name.removeprefix("random:")]
    if world.is_main:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
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

    return {"ours": lambda: engine.sync_weights(policy, next(versions)), "reload": reload, "disk": disk, "floor": floor}


def measure(systems: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn, the slowest rank's; one round more, the first, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in (*names[first:], *names[:first]):
            dist.barrier()
            start = time.perf_counter()
            systems[name]()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if repeat:
                seconds[name].append(took.item())
    return seconds


def rows(seconds: dict[str, list[float]]) -> list[dict]:
    """A row a system; ratios are paired by round."""
    found = []
    for name, of_system in seconds.items():
        row = {"system": name, "seconds": median(of_system), "least": min(of_system), "greatest": max(of_system)}
        for other in ("reload", "floor"):
            if other in seconds and other != name:
                ratios = [ours / theirs for ours, theirs in zip(of_system, seconds[other], strict=True)]
                row[f"of_{other}"] = median(ratios)
                row[f"of_{other}_range"] = [min(ratios), max(ratios)]
        found.append(row)
    return found


def table(found: list[dict]) -> str:
    lines = ["| | seconds | of reload_weights | of the floor |", "|---|---|---|---|"]
    for row in found:
        seconds = f"{row['seconds']:.3f} [{row['least']:.3f} .. {row['greatest']:.3f}]"
        ratios = [
            f"{row[f'of_{other}']:.2f} [{row[f'of_{other}_range'][0]:.2f} .. {row[f'of_{other}_range'][1]:.2f}]"
            if f"of_{other}" in row
            else ""
            for other in ("reload", "floor")
        ]
        lines.append(f"| {LABELS[row['system']]} | {seconds} | {ratios[0]} | {ratios[1]} |")
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
        seconds = measure({name: systems[name] for name in args.systems}, args.repeats)
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
        print(f"{caption}\n\n{table(rows(seconds))}")
        if args.json:
            whole = {"caption": caption, "first_seconds": first, "planned": planned, "rows": rows(seconds)}
            args.json.write_text(json.dumps(whole, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
