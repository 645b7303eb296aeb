"""Runs in every rank: exchanges of random boxes over tensors in every layout, compared with what full_tensor() gives.

torchrun --nproc_per_node=N shard_exchange_worker.py OUT
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from rollout import init_world
from rollout.backend.shard_exchange import (
    Box,
    Channel,
    Exchange,
    Need,
    find_holders,
    find_pieces,
    held_box,
    local_part,
    make_buckets,
    volume,
)

LIMITS = (64, 1000, 4096, 2**20)
STEPS = 5


def layouts(size: int) -> dict[str, tuple[DeviceMesh, list]]:
    """Every layout by name; of four ranks those of two dimensions, too."""
    line = init_device_mesh("cpu", (size,))
    found: dict[str, tuple[DeviceMesh, list]] = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "replicated": (line, [Replicate()]),
    }
    if size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found |= {
            "hsdp": (square, [Replicate(), Shard(0)]),
            "hsdp across": (square, [Shard(1), Replicate()]),
            "boxes": (square, [Shard(0), Shard(1)]),
            "rows twice": (square, [Shard(0), Shard(0)]),
        }
    return found


def random_sources(size: int, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sources, plain and in each layout, of random shapes, many of them uneven; and each of them whole."""
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sources: dict[str, torch.Tensor] = {}
    for name, (mesh, placements) in layouts(size).items():
        for number in range(3):
            shape = [dice.randint(1, 23), dice.randint(1, 17)] + [dice.randint(1, 5)] * (number == 2)
            sources[f"{name} {number}"] = distribute_tensor(torch.randn(shape, generator=generator), mesh, placements)
    sources["plain"] = torch.randn(dice.randint(1, 23), 9, generator=generator)
    sources["vector"] = distribute_tensor(
        torch.randn(dice.randint(1, 9), generator=generator), layouts(size)["rows"][0], [Shard(0)]
    )
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in sources.items()}
    return sources, whole


def random_needs(whole: dict[str, torch.Tensor], rank: int, seed: int) -> list[Need]:
    """Boxes that one rank wants; other ones on each, in another number."""
    dice = random.Random(1000 * seed + rank)
    needs = []
    for step in range(STEPS):
        for _ in range(dice.randint(1, 9)):
            source = dice.choice(sorted(whole))
            box = []
            for length in whole[source].shape:
                start = dice.randrange(length)
                box.append(slice(start, dice.randint(start + 1, length)))
            needs.append(Need(step, source, tuple(box), dice.choice([torch.float32, torch.bfloat16])))
    return needs


def shape_of(box: Box) -> list[int]:
    return [side.stop - side.start for side in box]


def exchanged(size: int, rank: int, seed: int, limit: int) -> dict[str, Any]:
    """One random exchange, run twice: are all targets right after each step, and those of later steps untouched?"""
    sources, whole = random_sources(size, seed)
    channel = Channel(dist.group.WORLD, torch.device("cpu"), limit)
    held = channel.tell({name: held_box(each) for name, each in sources.items()})
    holders = find_holders(held, {name: each.shape for name, each in sources.items()})
    needs = [random_needs(whole, each, seed) for each in range(size)]
    mine = needs[rank]
    targets = [torch.full(shape_of(need.box), 7.0, dtype=need.dtype) for need in mine]
    exchange = Exchange(holders, needs, targets, channel)
    wrong = 0
    for factor in (1.0, -3.0):  # the second time other values, through the same memory
        for target in targets:
            target.fill_(7.0)
        before = channel.received_bytes
        run = exchange.run(lambda name, factor=factor: local_part(sources[name]) * factor)
        for step in range(STEPS):
            run.fill(step)
            for need, target in zip(mine, targets, strict=True):
                right = (whole[need.source] * factor)[need.box].to(need.dtype)
                right = right if need.step <= step else torch.full_like(right, 7.0)
                wrong += not torch.equal(target, right)
    travelled = [piece for piece in find_pieces(holders, needs) if piece.sender != piece.receiver]
    buckets = make_buckets(travelled, channel.bucket_limit)
    sums = [[sum(p.num_bytes for p in b if side(p) == r) for r in range(size)] for b in buckets for side in SIDES]
    return {
        "wrong": wrong,
        "all_in_pieces": set(holders) == set(sources),
        "buckets": len(buckets),
        "largest": max((max(of_ranks) for of_ranks in sums), default=0),
        "memory": channel.memory_bytes,
        "received": channel.received_bytes - before,
        "missing": sum(volume(piece.box) for piece in travelled if piece.receiver == rank) * 2,
    }


SIDES = (lambda piece: piece.sender, lambda piece: piece.receiver)


def spread(size: int) -> list[int]:
    """How many elements each rank sends, when all want everything of a tensor of which two ranks hold each half."""
    _, (mesh, placements) = "hsdp", layouts(size)["hsdp"]
    source = distribute_tensor(torch.arange(64.0).view(16, 4), mesh, placements)
    channel = Channel(dist.group.WORLD, torch.device("cpu"))
    holders = find_holders(channel.tell({"it": held_box(source)}), {"it": source.shape})
    needs = [[Need(0, "it", (slice(0, 16), slice(0, 4)), torch.float32)]] * size
    sent = [0] * size
    for piece in find_pieces(holders, needs):
        if piece.sender != piece.receiver:
            sent[piece.sender] += volume(piece.box)
    return sent


def left_out(size: int) -> dict[str, bool]:
    """Which sources have no holders: partial sums, and FSDP2 over tensor parallelism along the same dimension."""
    line = layouts(size)["rows"][0]
    sources = {
        "partial": DTensor.from_local(torch.ones(4, 4), line, [Partial()]),
        "rows": distribute_tensor(torch.ones(5, 4), line, [Shard(0)]),
    }
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        linear = torch.nn.Linear(4, 8, bias=False)
        linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.detach(), mesh["tensor"], [Shard(0)]))
        fully_shard(linear, mesh=mesh["data"])
        sources["strided"] = linear.weight
    channel = Channel(dist.group.WORLD, torch.device("cpu"))
    held = channel.tell({name: held_box(each) for name, each in sources.items()})
    holders = find_holders(held, {name: each.shape for name, each in sources.items()})
    return {name: name not in holders for name in sources}


def nothing_to_send(size: int, rank: int) -> int:
    """Exchanges where every rank wants what it has."""
    source = distribute_tensor(torch.ones(4 * size, 3), layouts(size)["rows"][0], [Shard(0)])
    channel = Channel(dist.group.WORLD, torch.device("cpu"))
    held = channel.tell({"it": held_box(source)})
    holders = find_holders(held, {"it": source.shape})
    needs = [[Need(0, "it", of_rank["it"], torch.float32)] for of_rank in held]
    exchange = Exchange(holders, needs, [torch.empty(4, 3)], channel)
    exchange.run(lambda _: local_part(source)).fill(0)
    return len(exchange.buckets) + channel.received_bytes


def main() -> None:
    out = Path(sys.argv[1])
    world = init_world()
    results: dict[str, Any] = {"random": [], "silent": nothing_to_send(world.size, world.rank)}
    with torch.inference_mode():
        for seed in range(12):
            results["random"].append({"limit": (limit := LIMITS[seed % len(LIMITS)])})
            results["random"][-1] |= exchanged(world.size, world.rank, seed, limit)
    results["left_out"] = left_out(world.size)
    if world.size == 4:
        results["spread"] = spread(world.size)
    (out / f"rank{world.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
