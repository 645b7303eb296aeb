"""This rank's rollouts as right-padded tensors, and how they are cut into minibatches and micro-batches.

A minibatch is what one optimizer update sees: all ranks have the same number of them. A micro-batch is what one
forward and backward pass can hold: as many as this rank's lengths need.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from rollout import RolloutBatch


@dataclass(frozen=True)
class TrainBatch:
    """This rank's sequences for training, prompt then response, right-padded with zeros.

    (batch, response) tensors hold the response's tokens in columns 0 to length - 1 and are zero elsewhere. A response
    of several turns holds an environment's tokens, too: columns that the mask leaves out, and whatever is computed
    for a token is zero there. The optional ones are filled in as a step goes on: by `no_grad_pass`, then by
    `with_targets`.

    Attributes:
        input_ids: (batch, sequence) int64.
        prompt_lengths: (batch,) int64, in tokens, at least 1.
        response_lengths: (batch,) int64, in tokens, the stop token and an environment's tokens included.
        response_ids: (batch, response) int64.
        response_mask: (batch, response) bool; True = a token that the policy sampled; False = given by an environment,
            or padding. A row's last token is sampled.
        engine_logprobs: (batch, response) float32, natural log, as the engine sampled them.
        scores: (batch,) float32, of whole responses.
        groups: (batch,) int64, the number of the prompt among this rank's: equal for the responses of one prompt.
        logprobs: (batch, response) float32, of the policy before the first update, by the trainer; None where nobody
            needs them before that update.
        values: (batch, response) float32, V(s_t) before the first update, of the state before token t; None without
            a critic.
        ref_logprobs: (batch, response) float32, of the frozen reference; None without one.
        advantages: (batch, response) float32.
        returns: (batch, response) float32, the targets of the values; None without a critic.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    response_lengths: torch.Tensor
    response_ids: torch.Tensor
    response_mask: torch.Tensor
    engine_logprobs: torch.Tensor
    scores: torch.Tensor
    groups: torch.Tensor
    logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sampled_logprobs(self) -> torch.Tensor:
        """(batch, response) float32: the trainer's of the policy that sampled, or the engine's where there are none."""
        return self.engine_logprobs if self.logprobs is None else self.logprobs

    @property
    def lengths(self) -> torch.Tensor:
        """(batch,) int64: prompt plus response, in tokens."""
        return self.prompt_lengths + self.response_lengths

    @property
    def targets(self) -> torch.Tensor:
        """(tokens,) int64: the sampled tokens of all rows, packed."""
        return self.response_ids[self.response_mask]

    @property
    def predicts_response(self) -> torch.Tensor:
        """(batch, sequence) bool: True where the hidden state predicts a sampled token, one position before it."""
        row, column = self.response_mask.nonzero(as_tuple=True)
        predicts = torch.zeros_like(self.input_ids, dtype=torch.bool)
        predicts[row, self.prompt_lengths[row] - 1 + column] = True
        return predicts

    def with_targets(self, advantages: torch.Tensor, returns: torch.Tensor | None = None) -> "TrainBatch":
        """The batch with its advantages and, for a critic, its returns, both (batch, response)."""
        return replace(self, advantages=advantages, returns=returns)

    def to(self, device: torch.device | str) -> "TrainBatch":
        """The batch on another device."""
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **moved)

    def select(self, rows: torch.Tensor) -> "TrainBatch":
        """The rows given, in that order, their padding trimmed to the longest of them.

        Args:
            rows: (chosen,) int64, on any device.
        """
        rows = rows.to(self.input_ids.device)
        chosen = {f.name: value[rows] for f in fields(self) if (value := getattr(self, f.name)) is not None}
        sequence = max((chosen["prompt_lengths"] + chosen["response_lengths"]).tolist(), default=0)
        response = max(chosen["response_lengths"].tolist(), default=0)
        for name, value in chosen.items():
            if value.dim() == 2:
                chosen[name] = value[:, : sequence if name == "input_ids" else response]
        return TrainBatch(**chosen)

    def minibatches(self, num_minibatches: int, epochs: int, seed: int) -> Iterator["TrainBatch"]:
        """Every row once an epoch, in a new order each epoch, in parts whose sizes differ by one row at most.

        The order is one of prompts: the responses of one stay together (at most one prompt is cut where a part ends),
        so that packed passes need its tokens in one part alone.

        Every rank yields num_minibatches * epochs minibatches, so that their optimizer updates stay together; one with
        fewer rows than that yields some without rows.

        Args:
            num_minibatches: parts an epoch.
            epochs: passes over the batch.
            seed: of the orders; give each step its own.
        """
        generator = torch.Generator().manual_seed(seed)  # its own: the trainer's random state stays as it is
        prompts, prompt_of_row = self.groups.cpu().unique(return_inverse=True)
        for _ in range(epochs):
            place = torch.randperm(len(prompts), generator=generator).argsort()
            order = place[prompt_of_row].argsort(stable=True)
            for rows in order.tensor_split(num_minibatches):
                yield self.select(rows)


def make_batch(rollouts: RolloutBatch, scores: Sequence[float] | np.ndarray, device: torch.device | str) -> TrainBatch:
    """Pads this rank's rollouts and puts them on the device.

    Args:
        rollouts: at least one; every prompt and every response has a token.
        scores: (batch,) float, a response each.
        device: of the trainer.

    Raises:
        ValueError: if there is no response, or a prompt or response without a token, or not one score a response.

    >>> rollouts = RolloutBatch(
    ...     prompt_ids=np.array([5, 6, 7], np.int32), prompt_lengths=np.array([2, 1], np.int32),
    ...     response_ids=np.array([8, 9, 4], np.int32), response_lengths=np.array([1, 2], np.int32),
    ...     logprobs=np.array([-0.5, -0.25, -1.0], np.float32), finished=np.array([True, True]),
    ...     prompt_index=np.array([0, 1], np.int32), version=3)
    >>> batch = make_batch(rollouts, [1.0, 0.0], "cpu")
    >>> batch.input_ids
    tensor([[5, 6, 8],
            [7, 9, 4]])
    >>> batch.predicts_response.int()
    tensor([[0, 1, 0],
            [1, 1, 0]], dtype=torch.int32)
    >>> batch.engine_logprobs
    tensor([[-0.5000,  0.0000],
            [-0.2500, -1.0000]])
    """
    if len(scores) != len(rollouts):
        raise ValueError(f"{len(scores)} scores for {len(rollouts)} responses; give one score a response")
    if not len(rollouts) or min(rollouts.prompt_lengths.min(), rollouts.response_lengths.min()) < 1:
        raise ValueError(
            f"{len(rollouts)} responses with prompts of {rollouts.prompt_lengths.tolist()} and responses of "
            f"{rollouts.response_lengths.tolist()} tokens; training needs a response, and a token in each of both"
        )
    prompt_lengths, response_lengths = rollouts.prompt_lengths[:, None], rollouts.response_lengths[:, None]
    positions = np.arange((prompt_lengths + response_lengths).max())
    is_prompt = positions < prompt_lengths
    is_response = ~is_prompt & (positions < prompt_lengths + response_lengths)
    in_response = np.arange(response_lengths.max()) < response_lengths
    response_mask = in_response.copy()
    if rollouts.generated is not None:
        response_mask[in_response] = rollouts.generated

    # A boolean index takes the packed tokens in row order: the order in which they are packed.
    input_ids = np.zeros(is_prompt.shape, np.int64)
    input_ids[is_prompt] = rollouts.prompt_ids
    input_ids[is_response] = rollouts.response_ids
    response_ids = np.zeros(in_response.shape, np.int64)
    response_ids[in_response] = rollouts.response_ids
    engine_logprobs = np.zeros(in_response.shape, np.float32)
    engine_logprobs[in_response] = rollouts.logprobs
    engine_logprobs[~response_mask] = 0.0

    def tensor(array: Sequence[float] | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array, dtype=dtype, device=device)

    return TrainBatch(
        input_ids=tensor(input_ids, torch.int64),
        prompt_lengths=tensor(rollouts.prompt_lengths, torch.int64),
        response_lengths=tensor(rollouts.response_lengths, torch.int64),
        response_ids=tensor(response_ids, torch.int64),
        response_mask=tensor(response_mask, torch.bool),
        engine_logprobs=tensor(engine_logprobs, torch.float32),
        scores=tensor(scores, torch.float32),
        groups=tensor(rollouts.prompt_index, torch.int64),
    )


def stand_in(device: torch.device | str) -> TrainBatch:
    """One row that means nothing: for a rank without rows, which has to join in the others' passes all the same."""
    ids, one, zero = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, dtype=torch.int64), torch.zeros(1, 1)
    row = TrainBatch(
        input_ids=ids,
        prompt_lengths=one,
        response_lengths=one,
        response_ids=ids[:, :1],
        response_mask=torch.ones(1, 1, dtype=torch.bool),
        engine_logprobs=zero,
        scores=zero[0],
        groups=one,
        values=zero,
        ref_logprobs=zero,
        advantages=zero,
        returns=zero,
    )
    found = {f.name: value.to(device) for f in fields(row) if (value := getattr(row, f.name)) is not None}
    return TrainBatch(**found)


def no_rows(device: torch.device | str) -> TrainBatch:
    """The batch of a rank that has nothing to train on.

    >>> len(no_rows("cpu")), no_rows("cpu").input_ids.shape
    (0, torch.Size([0, 0]))
    """
    return stand_in(device).select(torch.zeros(0, dtype=torch.int64))


def unpack(packed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Packed (tokens,) values at the mask's True places, zero elsewhere: (batch, response); gradients flow through.

    >>> unpack(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[True, False], [True, True]]))
    tensor([[1., 0.],
            [2., 3.]])
    """
    return packed.new_zeros(mask.shape).masked_scatter(mask, packed)


def microbatch_rows(lengths: torch.Tensor, token_budget: int) -> list[torch.Tensor]:
    """Rows cut into groups that fit a token budget: rows of a group times its longest row is at most the budget.

    Rows of like length go together, so that little is padding; the longest first, so that a budget that is too large
    for the memory fails at once. A row longer than the budget makes a group of its own.

    Args:
        lengths: (batch,) int64, in tokens.
        token_budget: tokens of a group, padding counted.

    Returns:
        Row numbers on the CPU, each row in one group.

    >>> microbatch_rows(torch.tensor([2, 9, 3, 4]), token_budget=8)  # 9 > 8; 4 * 2 <= 8; 2
    [tensor([1]), tensor([3, 2]), tensor([0])]
    """
    longest_first = torch.argsort(lengths.cpu(), descending=True, stable=True)
    groups: list[list[int]] = []
    for row in longest_first.tolist():
        if groups and (len(groups[-1]) + 1) * int(lengths[groups[-1][0]]) <= token_budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.tensor(group) for group in groups]
