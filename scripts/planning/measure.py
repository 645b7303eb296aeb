"""The constants of a device file, measured on this machine by as many ranks as will run on it, all at once.

    python scripts/plan.py --measure mine.yaml --gpus 2

Rates are of the quickest repeat of the slowest rank; repeats are short, so that what else the machine does disturbs
few. What would need an engine of its own to measure (packing, the engine's products and attention, host work a step) is
taken over from the device file that comes along, and says so.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from rollout import RolloutConfig, RolloutEngine, SamplingConfig, World, init_world
from scripts.bench.inputs import SMALL_LLAMA, random_llama
from scripts.bench_step import torchrun
from scripts.bench_weight_sync import peak_memory
from trainers.activations import passes, rank_batch
from trainers.config import GRPOConfig, ModelConfig
from trainers.config import SamplingConfig as _Sampling
from trainers.devices import FOLDER, load_device
from trainers.grpo import loss
from trainers.hyperparameters import GRPOHyperparameters
from trainers.learner import make_learner, optimize
from trainers.model_sizes import count
from trainers.policy import Policy
from trainers.rewards import exact_number
from trainers.trainer_memory import Models, gradient_bytes, pass_bytes, precision_of, staying_bytes

REPEATS = 40
MIB = 2**20
ELEMENTS = 2**23
"""32 MiB of float32, and three of them: more than a cache holds."""
HEAP_MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
"""29M parameters: its tensors are as small beside the heap as a large model's."""
HEAP_STEPS, HEAP_TOKENS = 4, 900


def measure(file: Path, ranks: int) -> None:
    """Measure, and write a device file."""
    template = "h100" if torch.cuda.is_available() else "cpu"
    _, sources = load_device(template)
    written: dict[str, Any] = yaml.safe_load((FOLDER / f"{template}.yaml").read_text())
    with tempfile.TemporaryDirectory(prefix="plan-measure-") as folder:
        print("measuring; an engine is compiled for it, which takes a minute or two", file=sys.stderr, flush=True)
        torchrun(["-m", "scripts.planning.measure", folder], Path(folder), ranks=ranks)
        found = json.loads((Path(folder) / "found.json").read_text())
    how = f"--measure, {date.today().isoformat()}, {ranks} ranks at once, torch {torch.__version__}: "
    written |= {"name": found.pop("name"), "predicted": False}
    for name, entry in written["constants"].items():
        if name in found:
            written["constants"][name] = {"value": float(f"{found[name][0]:.3g}"), "source": how + found[name][1]}
        elif not entry["source"].startswith("the machine's"):
            entry["source"] = f"not measured here, from configs/devices/{template}.yaml: {sources[name]}"
    file.write_text(yaml.safe_dump(written, sort_keys=False, width=120))
    print(f"{file} is written; plan with --device {file}")


def main(folder: Path) -> None:
    world = init_world()
    found: dict[str, tuple[float, str]] = {}
    if world.device.type == "cpu":
        of_baseline = "resident memory of a rank with trainer and compiled engine of a model of 2 layers"
        found["baseline_gib"] = baseline_gib(folder, world), f"{of_baseline}, its KV cache left out"
        of_heap = f"resident memory that {HEAP_STEPS} updates of a model of 29M parameters take"
        found["heap_share"] = heap_share(world), f"{of_heap}, over the planned bytes, less 1"
    found |= rates(world)
    if world.is_main:
        (folder / "found.json").write_text(json.dumps({"name": device_name(world)} | found))
    dist.barrier()
    dist.destroy_process_group()


def rates(world: World) -> dict[str, tuple[float, str]]:
    """Of memory, products, attention and the ranks' all-reduce; and of the reward."""
    device = world.device
    half = torch.bfloat16
    a, b, c = (torch.ones(ELEMENTS, device=device) for _ in range(3))
    low = torch.ones(ELEMENTS, device=device, dtype=half)
    x, weight = torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device)
    x16, weight16 = x.to(half), weight.to(half)
    few = x[:128]
    operations = 2 * len(x) * weight.numel()

    def attend() -> None:
        dtype = torch.float32 if device.type == "cpu" else half
        q = torch.randn(4, 12, 64, 64, device=device, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(4, 4, 110, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
        mask = torch.ones(4, 1, 64, 110, device=device, dtype=torch.bool)
        F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).sum().backward()

    attended = 3.5 * 4 * 4 * 64 * 110 * 12 * 64
    found = {
        "memory_gb_per_s": (12 * ELEMENTS / seconds(lambda: torch.add(a, b, out=c), world) / 1e9,
                            "a sum of two arrays of 32 MiB into a third"),
        "cast_gb_per_s": (2 * ELEMENTS / seconds(lambda: low.copy_(a), world) / 1e9, "32 MiB of float32 to bfloat16"),
        "bf16_tflops": (operations / seconds(lambda: F.linear(x16, weight16), world) / 1e12, "1024 x 1024 x 1024"),
        "f32_tflops": (operations / 8 / seconds(lambda: F.linear(few, weight), world) / 1e12, "128 x 1024 x 1024"),
        "attention_tflops": (attended / seconds(attend, world) / 1e12,
                             "forward and backward, 4 rows of 64 queries and 110 keys, 12 heads of 64"),
        "reward_us": (seconds(lambda: [exact_number("The sum is 12.", "12") for _ in range(100)], world) * 1e4,
                      "exact_number of a short response"),
    }  # fmt: skip
    if world.size > 1:
        taken = seconds(lambda: dist.all_reduce(a), world)
        found["all_reduce_gb_per_s"] = 4 * ELEMENTS / taken / 1e9, "32 MiB of float32"
    return found


def seconds(work: Callable[[], Any], world: World) -> float:
    """Of the quickest repeat, the slowest rank's; all ranks begin each together."""
    taken = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        start = time.perf_counter()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    slowest = torch.tensor(min(taken[1:]), dtype=torch.float64, device=world.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def resident_mib() -> float:
    """Of this process, now."""
    (kib,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
    return int(kib) / 2**10


def baseline_gib(folder: Path, world: World) -> float:
    """Of a process whose trainer and engine hold a model that weighs nothing, the most of any rank."""
    model = folder / "model"
    if world.is_main:
        heads = {"num_key_value_heads": 4 * world.size, "num_attention_heads": 4 * world.size}
        random_llama(vocab_size=512, **(SMALL_LLAMA | heads)).save_pretrained(model)
    dist.barrier()
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    with RolloutEngine(str(model), RolloutConfig(max_model_len=128, kv_cache_gib=0.25)) as engine:
        engine.sync_weights(policy, version=0)
        engine.generate([[5] * 16] * 16, SamplingConfig(max_tokens=16, ignore_eos=True))
        engine.sleep()
        return most(resident_mib(), world) / 2**10


def heap_share(world: World) -> float:
    """What the allocator holds beside what is in use, over a few updates; the most of any rank."""
    before = resident_mib() * MIB
    config = GRPOConfig(
        model=ModelConfig(path="unused"),
        sampling=_Sampling(max_tokens=64, n=8),
        grpo=GRPOHyperparameters(micro_batch_tokens=HEAP_TOKENS, prompts_per_step=6 * world.size),
    )
    language_model = random_llama(**HEAP_MODEL)
    models = Models(count(language_model.config))
    learner = make_learner(config, Policy(language_model).train(), world.device)
    prompts = [38, 40, 42, 44, 46, 48]  # of several lengths, as a real step's: equal ones would fragment nothing
    batch = rank_batch(prompts, config.sampling.n, config.sampling.max_tokens)
    batch = batch.with_targets(torch.zeros(batch.response_mask.shape))
    batch = replace(batch, input_ids=batch.input_ids + 1)
    largest = max(passes(batch, HEAP_TOKENS, packed=True), key=lambda each: each.tokens)
    reset_peak()
    for step in range(HEAP_STEPS):
        optimize(batch, learner, loss, config, step=step)
    precision = precision_of(config, on_cpu=True)
    updates = batch.minibatches(config.grpo.minibatches, config.grpo.epochs, seed=0)
    most_passes = max(len(passes(each, HEAP_TOKENS, packed=True)) for each in updates)
    parts = staying_bytes(config, models, precision, world.size)
    parts |= {"gradients": gradient_bytes(config, models, precision, world.size, most_passes)}
    planned = sum((parts | pass_bytes(config, models, largest, precision)).values())
    return max(most(peak_memory() * MIB - before, world) / planned - 1, 0.0)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def most(value: float, world: World) -> float:
    """Of all ranks."""
    found = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def device_name(world: World) -> str:
    from scripts.bench.systems import device_name as of_machine

    return f"{of_machine()}, {world.size} ranks" if world.device.type == "cpu" else of_machine()


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    main(Path(sys.argv[1]))
