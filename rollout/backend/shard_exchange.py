"""Boxes of sharded tensors into memory of this rank, from whichever ranks hold them; nothing is gathered whole.

Every rank says once which box of each source it holds and which boxes it needs. From that all derive the same list of
pieces: a rank takes from itself what it holds, everything else from one of the holders. Pieces travel in the order in
which they are needed, in buckets that no rank sends or receives more than a limit of.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rollout.backend.transpose import copy_into
from rollout.world import gathered, machines_of_ranks

Box = tuple[slice, ...]
"""A part of a tensor: a start and a stop for each dimension."""

Holders = Mapping[str, Sequence[tuple[Box, Sequence[int]]]]
"""By source: boxes that fill it without an overlap, and the ranks that hold each, in order."""

BUCKET_BYTES = 16 * 2**20
ALIGNMENT = 16
"""Bytes; pieces of all dtypes share a bucket, and each is read and written as what it is."""


@dataclass(frozen=True)
class Need:
    """A box of a source that one rank needs.

    Attributes:
        step: in which it is needed: a whole number from 0. What is needed first travels first.
        source: the tensor's name.
        box: of the whole tensor.
        dtype: in which it is needed, and travels.
    """

    step: int
    source: str
    box: Box
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """A part of a need that one rank has.

    Attributes:
        need: of which it is a part.
        number: of the need, among the receiver's.
        sender: the rank that has it; the receiver itself, where nothing travels.
        receiver: the rank that needs it.
        box: of the whole tensor.
    """

    need: Need
    number: int
    sender: int
    receiver: int
    box: Box

    @property
    def num_bytes(self) -> int:
        """That it takes in a bucket."""
        return -(-volume(self.box) * self.need.dtype.itemsize // ALIGNMENT) * ALIGNMENT


def volume(box: Box) -> int:
    """Elements in a box.

    >>> volume((slice(1, 3), slice(0, 4)))
    8
    """
    return prod(side.stop - side.start for side in box)


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None if that is nothing.

    >>> overlap((slice(0, 3),), (slice(2, 9),))
    (slice(2, 3, None),)
    """
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return both if all(side.start < side.stop for side in both) else None


def inside(box: Box, outer: Box) -> Box:
    """A box of the whole tensor, as a box of the part that `outer` cuts out.

    >>> inside((slice(5, 7),), (slice(4, 8),))
    (slice(1, 3, None),)
    """
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, outer, strict=True))


def whole_box(shape: torch.Size) -> Box:
    """All of a tensor."""
    return tuple(slice(0, length) for length in shape)


def held_box(weight: torch.Tensor) -> Box | None:
    """Which part of the whole tensor this rank holds, maybe an empty one; None where that is no box of final values.

    Args:
        weight: any shape; plain, which every rank then has whole, or a DTensor. Partial sums and strided shards are
            no box.
    """
    if not isinstance(weight, DTensor):
        return whole_box(weight.shape)
    if any(type(placement) not in (Shard, Replicate) for placement in weight.placements):
        return None
    local = weight.to_local().shape
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    if 0 in local or not offset:
        return (slice(0, 0),) * weight.dim()
    if tuple(shape) != tuple(local):  # made by hand, of parts of other sizes
        return None
    return tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))


def local_part(weight: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor, in that part's shape; any other tensor as it is."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def find_holders(held: Sequence[Mapping[str, Box | None]], shapes: Mapping[str, torch.Size]) -> Holders:
    """Who holds what.

    Args:
        held: by rank, of `held_box`.
        shapes: of the whole tensors.

    Returns:
        Of each source the boxes that fill it. A source is left out if `held_box` found none on some rank, or if boxes
        overlap without being the same or leave something uncovered: each rank has to have that one whole.
    """
    found: dict[str, list[tuple[Box, list[int]]]] = {}
    for source, shape in shapes.items():
        by_place: dict[tuple, tuple[Box, list[int]]] = {}
        boxes = [of_rank[source] for of_rank in held]
        for rank, box in enumerate(boxes):
            if box is not None and (volume(box) or not prod(shape)):
                place = tuple((side.start, side.stop) for side in box)
                by_place.setdefault(place, (box, []))[1].append(rank)
        groups = list(by_place.values())
        apart = sum(volume(box) for box, _ in groups) == prod(shape) and not any(
            overlap(box, other) for number, (box, _) in enumerate(groups) for other, _ in groups[:number]
        )
        if apart and None not in boxes:
            found[source] = groups
    return found


def find_pieces(
    holders: Holders, needs: Sequence[Sequence[Need]], machines: Sequence[object] | None = None
) -> list[Piece]:
    """Where every part of every need comes from; the same on all ranks, in the order in which they are needed.

    A source without holders is there whole on every rank. Between machines only that travels which no rank of the
    receiver's machine holds.

    Args:
        needs: by rank.
        machines: by rank, equal for ranks of one machine; None means that all are.
    """
    machines = [None] * len(needs) if machines is None else machines
    pieces = []
    for receiver, of_rank in enumerate(needs):
        for number, need in enumerate(of_rank):
            if need.source not in holders:
                pieces.append(Piece(need, number, receiver, receiver, need.box))
                continue
            for box, ranks in holders[need.source]:
                part = overlap(need.box, box)
                if part is not None:
                    pieces.append(Piece(need, number, _sender(ranks, receiver, machines), receiver, part))
    # Receivers take turns: a bucket that is full for one of them is not empty for the others.
    return sorted(pieces, key=lambda piece: (piece.need.step, piece.number, piece.receiver))


def _sender(holders: Sequence[int], receiver: int, machines: Sequence[object]) -> int:
    """The receiver itself, if it holds it; the others are spread over the holders, those of their machine if any is."""
    near = [rank for rank in holders if machines[rank] == machines[receiver]] or holders
    place = bisect_left(near, receiver)
    if place < len(near) and near[place] == receiver:
        return receiver
    return near[(receiver - place) % len(near)]


def make_buckets(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """The pieces that travel, in order, in buckets; large ones cut.

    Args:
        limit: bytes that no rank sends more of in a bucket, and none receives more of.

    Raises:
        ValueError: if the limit is less than ALIGNMENT.
    """
    if limit < ALIGNMENT:
        raise ValueError(f"a bucket of {limit} bytes holds no number: it takes at least {ALIGNMENT}")
    buckets: list[list[Piece]] = []
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    left = [piece for piece in reversed(pieces) if piece.sender != piece.receiver]
    bucket: list[Piece] = []
    while left:
        piece = left.pop()
        used = max(sent[piece.sender], received[piece.receiver])
        fits, rest = _cut(piece, limit - used)
        if fits is None and used:
            buckets.append(bucket)
            bucket = []
            sent.clear()
            received.clear()
            rest = [piece]
        left.extend(reversed(rest))
        if fits is not None:
            bucket.append(fits)
            sent[fits.sender] += fits.num_bytes
            received[fits.receiver] += fits.num_bytes
    return [*buckets, bucket] if bucket else buckets


def _cut(piece: Piece, room: int) -> tuple[Piece | None, list[Piece]]:
    """As much of a piece as there is room for, and the rest, in order; a single row without room is rest by itself."""
    if piece.num_bytes <= room:
        return piece, []
    dim = next((dim for dim, side in enumerate(piece.box) if side.stop - side.start > 1), None)
    if dim is None:
        return None, [piece]
    side = piece.box[dim]
    row_bytes = volume(piece.box) // (side.stop - side.start) * piece.need.dtype.itemsize
    rows = room // ALIGNMENT * ALIGNMENT // row_bytes
    cut = side.start + max(rows, 1)

    def part(start: int, stop: int) -> Piece:
        return replace(piece, box=(*piece.box[:dim], slice(start, stop), *piece.box[dim + 1 :]))

    head, tail = part(side.start, cut), part(cut, side.stop)
    return (head, [tail]) if rows else (None, [head, tail])


class Channel:
    """The group that buckets go through, and the memory they need, kept for the next ones.

    Two buckets may be on their way at a time, in turn in one half of the memory and in the other: while one travels,
    what the last one brought is put in its place.

    Args:
        group: of all ranks of the job; gloo on the CPU.
        device: of the memory.
        limit: bytes that a rank sends at a time, and receives at a time: those of two buckets.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, limit: int = BUCKET_BYTES) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.machines = [machine.key for machine in machines_of_ranks()]
        self.bucket_limit = limit // 2
        self.received_bytes = 0
        """Since it was made."""
        self._group = group
        self._outgoing = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]
        self._incoming = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]
        self._on_its_way: list[dist.Work | None] = [None, None]

    @property
    def memory_bytes(self) -> int:
        """Of both halves, for both directions."""
        return sum(memory.numel() for memory in (*self._outgoing, *self._incoming))

    def tell(self, mine: Any) -> list[Any]:
        """All ranks together: what each of them says, by rank."""
        return gathered(mine, self._group)

    def outgoing(self, half: int, num_bytes: int) -> torch.Tensor:
        """(num_bytes,) uint8: what the next bucket in this half sends, once the last one has arrived."""
        self.wait(half)
        return self._room(self._outgoing, half, num_bytes)

    def start(self, half: int, sends: list[int], receives: list[int]) -> None:
        """All ranks together, in the same order: send `outgoing`, without waiting for anyone.

        Args:
            sends: bytes for each rank, in their order.
            receives: bytes from each rank.
        """
        incoming = self._room(self._incoming, half, sum(receives))
        outgoing = self._outgoing[half][: sum(sends)]
        self._on_its_way[half] = dist.all_to_all_single(
            incoming, outgoing, receives, sends, group=self._group, async_op=True
        )
        self.received_bytes += incoming.numel()

    def wait(self, half: int) -> torch.Tensor:
        """(bytes,) uint8: what the last bucket in this half has brought, until the next one is started."""
        work, self._on_its_way[half] = self._on_its_way[half], None
        if work is not None:
            work.wait()
        return self._incoming[half]

    def _room(self, memory: list[torch.Tensor], half: int, num_bytes: int) -> torch.Tensor:
        if memory[half].numel() < num_bytes:
            memory[half] = memory[half].new_empty(num_bytes)
        return memory[half][:num_bytes]


@dataclass(frozen=True)
class Slot:
    """Where a piece stands in the memory of a bucket."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """(shape) dtype: a view of it."""
        stop = self.start + prod(self.shape) * self.dtype.itemsize
        return memory[self.start : stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """One exchange, as one rank sees it.

    Attributes:
        outgoing: what is packed: source, box of this rank's part of it, place.
        incoming: by step: what is filled, and from which place.
        sends: bytes for each rank.
        receives: bytes from each rank.
    """

    outgoing: list[tuple[str, Box, Slot]]
    incoming: dict[int, list[tuple[torch.Tensor, Slot]]]
    sends: list[int]
    receives: list[int]


class Exchange:
    """Fills this rank's targets, and sends what the other ranks' need; as often as wanted. Derived without a word.

    Args:
        holders: of `find_holders`.
        needs: by rank; all ranks say the same.
        targets: of this rank's needs, each of the shape and dtype of its box, on the channel's device or another.
        channel: to the other ranks.
    """

    def __init__(
        self, holders: Holders, needs: Sequence[Sequence[Need]], targets: Sequence[torch.Tensor], channel: Channel
    ) -> None:
        self.channel = channel
        self._needs = needs[channel.rank]
        self._targets = targets
        self._mine = {source: box for source, held in holders.items() for box, ranks in held if channel.rank in ranks}
        pieces = find_pieces(holders, needs, channel.machines)
        buckets = make_buckets(pieces, channel.bucket_limit)
        self.copies: dict[int, list[tuple[torch.Tensor, str, Box]]] = defaultdict(list)
        for piece in pieces:
            if piece.sender == piece.receiver == channel.rank:
                self.copies[piece.need.step].append((self._target(piece), piece.need.source, self._place(piece)))
        self.buckets = [self._bucket(bucket) for bucket in buckets]
        self.due: dict[int, list[int]] = defaultdict(list)
        """By step: the buckets with anything of it, for whichever rank."""
        for number, bucket in enumerate(buckets):
            for step in dict.fromkeys(piece.need.step for piece in bucket):
                self.due[step].append(number)

    def run(self, local: Callable[[str], torch.Tensor]) -> "Run":
        """Start to fill the targets.

        Args:
            local: this rank's part of a source, in any dtype; the whole of one without holders, in the steps that need
                it.
        """
        return Run(self, local)

    def _target(self, piece: Piece) -> torch.Tensor:
        return self._targets[piece.number][inside(piece.box, self._needs[piece.number].box)]

    def _place(self, piece: Piece) -> Box:
        """Of a piece in this rank's part of the source."""
        box = self._mine.get(piece.need.source)
        return piece.box if box is None else inside(piece.box, box)

    def _bucket(self, pieces: Sequence[Piece]) -> Bucket:
        """A rank's part of a bucket stands in the order of the others; what is for one of them, in that of the list."""
        rank, size = self.channel.rank, self.channel.size
        bucket = Bucket([], defaultdict(list), [0] * size, [0] * size)
        start = 0
        for piece in sorted((each for each in pieces if each.sender == rank), key=lambda each: each.receiver):
            bucket.outgoing.append((piece.need.source, self._place(piece), _slot(piece, start)))
            bucket.sends[piece.receiver] += piece.num_bytes
            start += piece.num_bytes
        start = 0
        for piece in sorted((each for each in pieces if each.receiver == rank), key=lambda each: each.sender):
            bucket.incoming[piece.need.step].append((self._target(piece), _slot(piece, start)))
            bucket.receives[piece.sender] += piece.num_bytes
            start += piece.num_bytes
        return bucket


def _slot(piece: Piece, start: int) -> Slot:
    return Slot(start, piece.need.dtype, tuple(side.stop - side.start for side in piece.box))


class Run:
    """One filling of all targets, step by step; all ranks take the same steps, in rising order."""

    def __init__(self, exchange: Exchange, local: Callable[[str], torch.Tensor]) -> None:
        self._exchange = exchange
        self._local = local
        self._arrived = 0
        self._send(0)

    def fill(self, step: int) -> None:
        """Fill what is needed in one step. What later steps need is not touched: their targets may be the same memory.

        Together with all ranks: waits for the buckets that hold anything of this step for anyone, and sends the one
        behind each.
        """
        exchange = self._exchange
        for target, source, box in exchange.copies.get(step, ()):
            copy_into(target, self._local(source)[box])
        for number in exchange.due.get(step, ()):
            while self._arrived <= number:
                exchange.channel.wait(self._arrived % 2)
                self._arrived += 1
                # In the half of the bucket before this one, all of which is in its place: it was due before.
                self._send(self._arrived)
            incoming = exchange.channel.wait(number % 2)
            for target, slot in exchange.buckets[number].incoming.get(step, ()):
                copy_into(target, slot.of(incoming))

    def _send(self, number: int) -> None:
        if number == len(self._exchange.buckets):
            return
        channel, bucket = self._exchange.channel, self._exchange.buckets[number]
        outgoing = channel.outgoing(number % 2, sum(bucket.sends))
        for source, box, slot in bucket.outgoing:
            slot.of(outgoing).copy_(self._local(source)[box])
        channel.start(number % 2, bucket.sends, bucket.receives)
