"""Sampling from a distribution whose logits lie in shards on several ranks, without gathering them.

One pass over a rank's shard gives the log-mass of each block of BLOCK neighbouring tokens. A block is drawn by the
Gumbel-max trick (Gumbel 1954; Maddison, Tarlow, Minka, A* Sampling, 2014): the block with the largest

    log mass(block) + g(block),   g = -log(-log u)

is block b with probability mass(b) / total mass. Inside it the token is drawn by inverting the cumulative sum. Each
rank draws among its own blocks; the rank whose score is the largest holds the token, so the ranks exchange four
numbers a row: score, the token's logit, the shard's log-sum-exp, and the token.

Randomness is counter-based: u is a function of (seed, position, block). The same tokens come out whatever the batch,
the schedule and the number of ranks (where every shard begins at a multiple of BLOCK, and but for the rounding of
sums).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

BLOCK = 64
"""Tokens a block: vLLM pads vocabularies to a multiple of it, so that shards begin at one more often than not."""

# Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (OOPSLA 2014), the mix of SplitMix64.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)

OUTSIDE = -1e30
"""The logit of a padding entry: no mass, and unlike minus infinity without a difference that is not a number."""


class ShardLogits(Protocol):
    """What sampling asks of a shard's logits, cut into blocks; the last one is filled up with logits of OUTSIDE."""

    def log_masses(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log of the summed exp(scale * logit) of each block, and the largest scale * logit in it.

        Args:
            scale: (rows,) float32, 1 / temperature.

        Returns:
            Twice (rows, blocks) float32.
        """
        ...

    def of_blocks(self, block: torch.Tensor) -> torch.Tensor:
        """(rows, BLOCK) float32: each row's logits in its own block; `block` (rows,) int64."""
        ...


def block_log_masses(high: torch.Tensor, low: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """`ShardLogits.log_masses` of high + low, (rows, blocks * BLOCK), as one tensor (2, rows, blocks)."""
    logits = high.float() if low is None else high.float() + low.float()
    blocks = (logits * scale[:, None]).view(len(high), -1, BLOCK)
    peaks = blocks.amax(-1)
    masses = (blocks - peaks[..., None]).exp().sum(-1).log() + peaks
    return torch.stack([masses, peaks])


def in_tiles(high: torch.Tensor, low: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """As `block_log_masses`, a few rows at a time: what is not compiled should at least stay in the cache."""
    rows = max(1, 2**18 // high.shape[1])  # 1 MiB of float32
    parts = [
        block_log_masses(high[i : i + rows], None if low is None else low[i : i + rows], scale[i : i + rows])
        for i in range(0, len(high), rows)
    ]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Logits:
    """A shard's logits in memory: high + low, or high alone.

    Attributes:
        high: (rows, shard) of any floating dtype; entries behind `size` are padding, whatever they hold.
        low: the same shape and dtype, what rounding took from `high`; None where nothing did.
        size: the shard's tokens; None if there is no padding.
        masses_of: `block_log_masses`, tiled or compiled.
    """

    high: torch.Tensor
    low: torch.Tensor | None = None
    size: int | None = None
    masses_of: Callable[..., torch.Tensor] = field(default=in_tiles, repr=False)

    def float(self) -> torch.Tensor:
        """(rows, shard) float32."""
        return self.high.float() if self.low is None else self.high.float() + self.low.float()

    def log_masses(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ShardLogits.log_masses`: (rows,) float32 to twice (rows, blocks) float32."""
        high, low = self._whole_blocks()
        masses, peaks = self.masses_of(high, low, scale)
        return masses, peaks

    def of_blocks(self, block: torch.Tensor) -> torch.Tensor:
        """As `ShardLogits.of_blocks`: (rows,) int64 to (rows, BLOCK) float32."""
        high, low = self._whole_blocks()
        row = torch.arange(len(high))
        logits = high.view(len(high), -1, BLOCK)[row, block].float()
        return logits if low is None else logits + low.view(len(high), -1, BLOCK)[row, block].float()

    def _whole_blocks(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cut the padding off behind `size`, and fill the last block up with entries of no mass."""
        width = self.high.shape[1]
        size = width if self.size is None else self.size
        if width == size and width % BLOCK == 0:
            return self.high, self.low
        padding = (0, -size % BLOCK)
        high = torch.nn.functional.pad(self.high[:, :size], padding, value=OUTSIDE)
        low = None if self.low is None else torch.nn.functional.pad(self.low[:, :size], padding)
        return high, low


def splitmix64(state: np.ndarray) -> np.ndarray:
    """The output of SplitMix64 at each state: uint64 to uint64, any shape."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        state = (state ^ (state >> np.uint64(30))) * MIX_1
        state = (state ^ (state >> np.uint64(27))) * MIX_2
    return state ^ (state >> np.uint64(31))


def request_streams(seed: Sequence[int], given: Sequence[int | None], replica: int = 0) -> np.ndarray:
    """The key of each sequence's random numbers: as given, or drawn from `seed` and its number among those without.

    A longer batch begins with the keys of a shorter one, and sequences that go on do not move the others' keys.

    Args:
        replica: draws other keys than any other one.

    Returns:
        (sequences,) int64, at least 0.

    >>> drawn = request_streams((0, 1), [None, None])
    >>> request_streams((0, 1), [None, 7, None]).tolist() == [drawn[0], 7, drawn[1]]
    True
    """
    fresh = np.array([stream is None for stream in given], bool)
    streams = np.array([0 if stream is None else stream for stream in given], np.int64)
    drawn = np.random.SeedSequence(seed, spawn_key=(replica,) if replica else ())
    streams[fresh] = drawn.generate_state(int(fresh.sum()), np.uint64) >> np.uint64(1)
    return streams


def step_seeds(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One seed a row for one step: SplitMix64 of the request's seed, `positions` draws on.

    Args:
        seeds: (rows,) uint64, of the requests.
        positions: (rows,) of the token to be sampled, in its sequence.

    Returns:
        (rows,) int64, at least 0.

    >>> step_seeds(np.array([1, 1, 2], np.uint64), np.array([5, 6, 5])).tolist()
    [7036458801432265024, 8092113344071933522, 3197026156266379609]
    """
    with np.errstate(over="ignore"):
        state = seeds + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA
    return (splitmix64(state) >> np.uint64(1)).astype(np.int64)


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Draw number `counters` of each row's stream: strictly between 0 and 1.

    Args:
        seeds: (rows,) int64, from `step_seeds`.
        counters: (rows, draws) or (draws,) of any integer dtype, at least 0.

    Returns:
        (rows, draws) float64 with 52 random bits.
    """
    with np.errstate(over="ignore"):
        states = seeds.astype(np.uint64)[:, None] + (counters.astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA
    return ((splitmix64(states) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def candidates(logits: ShardLogits, start: int, temperature: torch.Tensor, seeds: np.ndarray) -> torch.Tensor:
    """Draw one token a row from this rank's shard.

    Args:
        logits: of the shard.
        start: the shard's first token.
        temperature: (rows,) float32; 0 takes the likeliest token, and log-probs at temperature 1.
        seeds: (rows,) int64, from `step_seeds`.

    Returns:
        (rows, 4) float32: score, scaled logit of the token, log-sum-exp of the shard, token id. Ids are exact up to
        2**24.
    """
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, 1.0 / temperature)
    masses, peaks = logits.log_masses(scale)
    rows, num_blocks = masses.shape
    # Where every shard begins at a block, these are the numbers of the blocks in the vocabulary.
    numbers = -(-start // BLOCK) + np.arange(num_blocks)
    gumbel = torch.from_numpy(-np.log(-np.log(uniforms(seeds, numbers))))
    scores = torch.where(greedy[:, None], peaks.double(), masses.double() + gumbel)
    score, block = scores.max(-1)

    row = torch.arange(rows)
    inside = logits.of_blocks(block) * scale[:, None]
    # Draws of their own: the block's numbers moved out of the way of all block numbers.
    draws = uniforms(seeds, (numbers[block.numpy()] + 2**32)[:, None])
    cumulative = (inside - peaks[row, block][:, None]).double().exp().cumsum(-1)
    drawn = (cumulative > torch.from_numpy(draws) * cumulative[:, -1:]).int().argmax(-1)
    offset = torch.where(greedy, inside.argmax(-1), drawn)
    token = start + block * BLOCK + offset
    return torch.stack([score.float(), inside[row, offset], masses.logsumexp(-1), token.float()], dim=-1)


def combine(everyones: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The drawn tokens and their log-probs, from every rank's candidates.

    Args:
        everyones: (ranks, rows, 4) float32, from `candidates`, in rank order.

    Returns:
        Token ids (rows,) int64; log-probs (rows,) float32, natural log.
    """
    score, logit, mass, token = everyones.unbind(-1)
    winner = score.argmax(0, keepdim=True)
    return token.gather(0, winner)[0].long(), logit.gather(0, winner)[0] - mass.logsumexp(0)
