"""A phase's prompts shared out over the replicas by how long their responses are expected to be, and brought back.

Responses differ in length by a factor of ten and more; a replica that was given the long ones makes the others wait.
Every rank knows all prompts of the phase and how long the last responses to each of them were, and so makes the same
shares without another word. A prompt and its responses travel as token ids; they come back to the rank that gave it.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep

import numpy as np
import torch
import torch.distributed as dist

from rollout.driver import Collected
from rollout.types import Asked
from rollout.world import gathered

BARRIER_POLL_S = 0.002


def partition(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Numbers of `costs` in as many parts of nearly the same sum: the largest first, each to the part with the least.

    That is at most 4/3 - 1 / (3 * parts) of the best there is (Graham 1969, "Bounds on Multiprocessing Timing
    Anomalies").

    >>> partition([5, 9, 4, 7], parts=2)
    [[1, 2], [0, 3]]
    """
    least = [(0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        total, part = heapq.heappop(least)
        found[part].append(number)
        heapq.heappush(least, (total + costs[number], part))
    return [sorted(part) for part in found]


class PastLengths:
    """How long the last responses to each prompt were; told the same on all ranks, it says the same on all.

    >>> past = PastLengths()
    >>> past.predict([[5, 6], [7]], limits=[8, 8])  # nothing is known: as long as the prompts
    [2, 1]
    >>> past.note([5, 6], 6.0)
    >>> past.predict([[5, 6], [7]], limits=[8, 8])  # what it was; three times the prompt, as of those that are known
    [6, 3]
    """

    def __init__(self) -> None:
        self._last: dict[bytes, float] = {}
        self._prompt_tokens, self._response_tokens = 0, 0.0

    def note(self, prompt: Sequence[int] | np.ndarray, mean: float) -> None:
        """Take in what came of a prompt.

        Args:
            prompt: token ids.
            mean: tokens of a response to it.
        """
        self._last[_key(prompt)] = mean
        self._prompt_tokens += len(prompt)
        self._response_tokens += mean

    def predict(self, prompts: Sequence[Sequence[int] | np.ndarray], limits: Sequence[int]) -> list[int]:
        """How many tokens a response to each prompt will have, from 1 to its limit.

        Of a prompt that was answered before, as many as then. Of another one, its own tokens, times the response's
        over the prompt's tokens of all that were answered.
        """
        ratio = self._response_tokens / self._prompt_tokens if self._prompt_tokens else 1.0
        expected = [self._last.get(_key(prompt), ratio * len(prompt)) for prompt in prompts]
        return [min(max(round(tokens), 1), limit) for tokens, limit in zip(expected, limits, strict=True)]


def _key(prompt: Sequence[int] | np.ndarray) -> bytes:
    return hashlib.blake2b(np.asarray(prompt, np.int32).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Shares:
    """Who answers which prompt of a phase; the same on all ranks.

    Prompts are numbered over all ranks, in the ranks' order, and so are the sequences: the samples of the first prompt,
    then those of the second.

    Attributes:
        of_replicas: the prompts that each replica answers, rising.
        givers: (prompts,) int64, the rank that gave each prompt.
        samples: (prompts,) int64, responses to each prompt.
        tensor_parallel_size: ranks of a replica.
    """

    of_replicas: list[list[int]]
    givers: np.ndarray
    samples: np.ndarray
    tensor_parallel_size: int

    def sequences(self, replica: int) -> np.ndarray:
        """(rows,) int64: the sequences of a replica, rising."""
        return self._expand(np.arange(len(self.givers)), self._answers(replica))

    def rows(self, replica: int, giver: int) -> np.ndarray:
        """(rows,) int64: which of a replica's sequences answer a rank's prompts, rising."""
        numbers = np.array(self.of_replicas[replica], np.int64)
        return self._expand(numbers, self.givers == giver)

    def places(self, replica: int, giver: int) -> np.ndarray:
        """(rows,) int64: which of a rank's sequences a replica answers, rising."""
        return self._expand(np.flatnonzero(self.givers == giver), self._answers(replica))

    def sender(self, replica: int, receiver: int) -> int:
        """The rank that sends a replica's rows to another rank: its ranks take turns, and nobody sends to itself."""
        size = self.tensor_parallel_size
        return receiver if receiver // size == replica else replica * size + receiver % size

    def _answers(self, replica: int) -> np.ndarray:
        """(prompts,) bool: True for those of a replica."""
        return np.isin(np.arange(len(self.givers)), self.of_replicas[replica])

    def _expand(self, numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Of the samples of these prompts, one after another, the places of those of a wanted prompt."""
        return np.flatnonzero(np.repeat(wanted[numbers], self.samples[numbers]))


def share_out(of_ranks: Sequence[Sequence[Asked]], predicted: Sequence[int], tensor_parallel_size: int) -> Shares:
    """Shares of nearly the same number of tokens: of a prompt its own, once, and those of its responses.

    Args:
        of_ranks: what each rank asks for.
        predicted: of each prompt, tokens of a response.

    >>> short, long = (Asked(np.zeros(tokens, np.int32), samples=2, max_tokens=9) for tokens in (2, 3))
    >>> share_out([[short, short], [long]], [1, 1, 9], tensor_parallel_size=1).of_replicas
    [[2], [0, 1]]
    """
    everyones = [asked for of_rank in of_ranks for asked in of_rank]
    costs = [len(each.prompt_ids) + each.samples * tokens for each, tokens in zip(everyones, predicted, strict=True)]
    givers = np.repeat(np.arange(len(of_ranks)), [len(of_rank) for of_rank in of_ranks])
    samples = np.array([each.samples for each in everyones], np.int64)
    return Shares(partition(costs, len(of_ranks) // tensor_parallel_size), givers, samples, tensor_parallel_size)


class Balance:
    """The job's shares from phase to phase, and the way of the responses back to who gave the prompts.

    Args:
        group: a gloo group of all ranks of the job.
        tensor_parallel_size: ranks of a replica.
    """

    def __init__(self, group: dist.ProcessGroup, tensor_parallel_size: int) -> None:
        self.group, self._rank = group, dist.get_rank(group)
        self._tensor_parallel_size = tensor_parallel_size
        self._replica = self._rank // tensor_parallel_size
        self._past = PastLengths()

    def shares(self, of_ranks: Sequence[Sequence[Asked]]) -> Shares:
        """Of a phase in which each rank asks for these."""
        everyones = [asked for of_rank in of_ranks for asked in of_rank]
        limits = [asked.max_tokens for asked in everyones]
        predicted = self._past.predict([asked.prompt_ids for asked in everyones], limits)
        return share_out(of_ranks, predicted, self._tensor_parallel_size)

    def wait_for_others(self, beat: Callable[[], None]) -> float:
        """Wait until every replica has its responses; returns the seconds. A collective of all ranks.

        Args:
            beat: called meanwhile: whoever waits for a slower replica does not stand still itself.
        """
        start = perf_counter()
        barrier = dist.barrier(self.group, async_op=True)
        while not barrier.is_completed():
            beat()
            sleep(BARRIER_POLL_S)
        barrier.wait()  # raises what went wrong
        return perf_counter() - start

    def bring_back(self, shares: Shares, everyones: Sequence[Asked], collected: Collected) -> Collected:
        """The responses to this rank's prompts, in their order; a collective of all ranks.

        Args:
            everyones: what the ranks asked for, in the order of the shares' numbers.
            collected: of this replica.
        """
        outgoing = [
            packed(collected, shares.rows(self._replica, receiver))
            if shares.sender(self._replica, receiver) == self._rank
            else np.zeros(0, np.int32)
            for receiver in range(dist.get_world_size(self.group))
        ]
        incoming = self._exchange(outgoing)
        mine = np.flatnonzero(shares.givers == self._rank)
        width = max((asked.max_tokens for asked in everyones), default=1)
        found = Collected.empty(int(shares.samples[mine].sum()), width)
        for replica in range(len(shares.of_replicas)):
            unpack(incoming[shares.sender(replica, self._rank)], found, shares.places(replica, self._rank))
        prompt_of_row = np.repeat(np.arange(len(mine)), shares.samples[mine])
        totals = np.bincount(prompt_of_row, weights=found.lengths, minlength=len(mine))
        self._note(everyones, (totals / shares.samples[mine]).tolist())
        return found

    def _exchange(self, outgoing: Sequence[np.ndarray]) -> list[np.ndarray]:
        """By rank, what it has sent to this one: int32 words."""
        sizes = torch.tensor([len(words) for words in outgoing])
        theirs = torch.empty_like(sizes)
        dist.all_to_all_single(theirs, sizes, group=self.group)
        incoming = torch.empty(int(theirs.sum()), dtype=torch.int32)
        words = torch.from_numpy(np.concatenate(outgoing))
        dist.all_to_all_single(incoming, words, theirs.tolist(), sizes.tolist(), group=self.group)
        return [part.numpy() for part in incoming.split(theirs.tolist())]

    def _note(self, everyones: Sequence[Asked], means: list[float]) -> None:
        of_ranks = gathered(means, self.group)
        for asked, mean in zip(everyones, (mean for of_rank in of_ranks for mean in of_rank), strict=True):
            if asked.stream is None:  # a row that goes on: its context will not be asked about again
                self._past.note(asked.prompt_ids, mean)


def packed(collected: Collected, rows: np.ndarray) -> np.ndarray:
    """`rows` (k,) int64 as (words,) int32: lengths, whether they ended by themselves, tokens, bits of log-probs."""
    lengths = collected.lengths[rows]
    valid = np.arange(collected.token_ids.shape[1]) < lengths[:, None]
    logprobs = collected.logprobs[rows][valid].view(np.int32)
    return np.concatenate(
        [lengths, collected.finished[rows].astype(np.int32), collected.token_ids[rows][valid], logprobs]
    )


def unpack(words: np.ndarray, collected: Collected, rows: np.ndarray) -> None:
    """Put what `packed` made, (words,) int32, into `rows` (k,) int64 of another one, in the same order."""
    lengths, finished, rest = np.split(words, [len(rows), 2 * len(rows)])
    tokens, logprobs = np.split(rest, 2)
    valid = np.arange(collected.token_ids.shape[1]) < lengths[:, None]
    for values, part in ((collected.token_ids, tokens), (collected.logprobs, logprobs.view(np.float32))):
        block = np.zeros(valid.shape, values.dtype)
        block[valid] = part
        values[rows] = block
    collected.lengths[rows], collected.finished[rows], collected.done[rows] = lengths, finished.astype(bool), True
