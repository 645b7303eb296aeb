"""A phase's prompts shared out over the replicas by how long their responses are expected to be, and brought back.

Responses differ in length by a factor of ten and more; a replica that was given the long ones makes the others wait.
Every rank knows all prompts of the phase and how long the last responses to each of them were, and so makes the same
shares without another word. A prompt and its responses travel as token ids; they come back to the rank that gave it.
"""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rollout.driver import Collected


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
    >>> past.predict([[5, 6], [7]], limit=8)  # nothing is known: as long as the prompts
    [2, 1]
    >>> past.note([5, 6], 6.0)
    >>> past.predict([[5, 6], [7]], limit=8)  # what it was; three times the prompt, as of those that are known
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

    def predict(self, prompts: Sequence[Sequence[int] | np.ndarray], limit: int) -> list[int]:
        """How many tokens a response to each prompt will have, from 1 to `limit`.

        Of a prompt that was answered before, as many as then. Of another one, its own tokens, times the response's
        over the prompt's tokens of all that were answered.
        """
        ratio = self._response_tokens / self._prompt_tokens if self._prompt_tokens else 1.0
        expected = [self._last.get(_key(prompt), ratio * len(prompt)) for prompt in prompts]
        return [min(max(round(tokens), 1), limit) for tokens in expected]


def _key(prompt: Sequence[int] | np.ndarray) -> bytes:
    return hashlib.blake2b(np.asarray(prompt, np.int32).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Shares:
    """Who answers which prompt of a phase; the same on all ranks.

    Prompts are numbered over all ranks, in the ranks' order.

    Attributes:
        of_replicas: the prompts that each replica answers, rising.
        givers: (prompts,) int64, the rank that gave each prompt.
        tensor_parallel_size: ranks of a replica.
        n: responses to a prompt.
    """

    of_replicas: list[list[int]]
    givers: np.ndarray
    tensor_parallel_size: int
    n: int

    def rows(self, replica: int, giver: int) -> np.ndarray:
        """(rows,) int64: which of a replica's sequences answer a rank's prompts, rising."""
        return sequences(np.flatnonzero(self.givers[self.of_replicas[replica]] == giver), self.n)

    def sender(self, replica: int, receiver: int) -> int:
        """The rank that sends a replica's rows to another rank: its ranks take turns, and nobody sends to itself."""
        size = self.tensor_parallel_size
        return receiver if receiver // size == replica else replica * size + receiver % size


def share_out(
    prompts_of_ranks: Sequence[Sequence[np.ndarray]], predicted: Sequence[int], tensor_parallel_size: int, n: int
) -> Shares:
    """Shares of nearly the same number of tokens: of a prompt its own, once, and those of its n responses.

    Args:
        prompts_of_ranks: by rank, (tokens,) int32 each.
        predicted: of each prompt, tokens of a response.

    >>> short, long = np.zeros(2, np.int32), np.zeros(3, np.int32)
    >>> share_out([[short, short], [long]], [1, 1, 9], tensor_parallel_size=1, n=2).of_replicas
    [[2], [0, 1]]
    """
    prompts = [prompt for of_rank in prompts_of_ranks for prompt in of_rank]
    costs = [len(prompt) + n * tokens for prompt, tokens in zip(prompts, predicted, strict=True)]
    givers = np.repeat(np.arange(len(prompts_of_ranks)), [len(of_rank) for of_rank in prompts_of_ranks])
    return Shares(partition(costs, len(prompts_of_ranks) // tensor_parallel_size), givers, tensor_parallel_size, n)


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

    def shares(self, prompts_of_ranks: Sequence[Sequence[np.ndarray]], n: int, max_tokens: int) -> Shares:
        """Of a phase."""
        prompts = [prompt for of_rank in prompts_of_ranks for prompt in of_rank]
        predicted = self._past.predict(prompts, max_tokens)
        return share_out(prompts_of_ranks, predicted, self._tensor_parallel_size, n)

    def bring_back(
        self, shares: Shares, prompts_of_ranks: Sequence[Sequence[np.ndarray]], collected: Collected
    ) -> Collected:
        """The responses to this rank's prompts, in their order; a collective of all ranks.

        Args:
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
        found = Collected.empty(len(mine) * shares.n, collected.token_ids.shape[1])
        for replica, prompts in enumerate(shares.of_replicas):
            answered = [prompt for prompt in prompts if shares.givers[prompt] == self._rank]
            rows = sequences(np.searchsorted(mine, np.array(answered, np.int64)), shares.n)
            unpack(incoming[shares.sender(replica, self._rank)], found, rows)
        self._note(prompts_of_ranks, found.lengths.reshape(len(mine), shares.n).mean(1).tolist())
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

    def _note(self, prompts_of_ranks: Sequence[Sequence[np.ndarray]], means: list[float]) -> None:
        everyones: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyones, means, group=self.group)
        for prompts, of_rank in zip(prompts_of_ranks, everyones, strict=True):
            for prompt, mean in zip(prompts, of_rank, strict=True):
                self._past.note(prompt, mean)


def sequences(prompts: np.ndarray, n: int) -> np.ndarray:
    """The numbers of the n responses to each prompt: (prompts,) int64 to (prompts * n,) int64.

    >>> sequences(np.array([0, 2]), 3)
    array([0, 1, 2, 6, 7, 8])
    """
    return (prompts[:, None] * n + np.arange(n)).reshape(-1)


def packed(collected: Collected, rows: np.ndarray) -> np.ndarray:
    """Rows as int32 words: their lengths, whether they ended by themselves, tokens, bits of the log-probs."""
    lengths = collected.lengths[rows]
    valid = np.arange(collected.token_ids.shape[1]) < lengths[:, None]
    logprobs = collected.logprobs[rows][valid].view(np.int32)
    return np.concatenate(
        [lengths, collected.finished[rows].astype(np.int32), collected.token_ids[rows][valid], logprobs]
    )


def unpack(words: np.ndarray, collected: Collected, rows: np.ndarray) -> None:
    """Put what `packed` made into rows of another one, in the same order."""
    lengths, finished, rest = np.split(words, [len(rows), 2 * len(rows)])
    tokens, logprobs = np.split(rest, 2)
    valid = np.arange(collected.token_ids.shape[1]) < lengths[:, None]
    for values, part in ((collected.token_ids, tokens), (collected.logprobs, logprobs.view(np.float32))):
        block = np.zeros(valid.shape, values.dtype)
        block[valid] = part
        values[rows] = block
    collected.lengths[rows], collected.finished[rows], collected.done[rows] = lengths, finished.astype(bool), True
