"""Padding, cutting and ordering of a batch: every token goes where it belongs, and every row is used once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import RolloutBatch
from trainers.batching import TrainBatch, make_batch, microbatch_rows, unpack


def rollouts(prompt_lengths: list[int], response_lengths: list[int]) -> RolloutBatch:
    """Prompt ids 100, 101, ..., response ids 200, 201, ..., log-probs -1, -2, ... in packed order."""
    num_prompt, num_response = sum(prompt_lengths), sum(response_lengths)
    return RolloutBatch(
        prompt_ids=np.arange(100, 100 + num_prompt, dtype=np.int32),
        prompt_lengths=np.array(prompt_lengths, np.int32),
        response_ids=np.arange(200, 200 + num_response, dtype=np.int32),
        response_lengths=np.array(response_lengths, np.int32),
        logprobs=-np.arange(1, 1 + num_response, dtype=np.float32),
        finished=np.ones(len(response_lengths), bool),
        prompt_index=np.arange(len(response_lengths), dtype=np.int32),
        version=0,
    )


def batch_of(prompt_lengths: list[int], response_lengths: list[int]) -> TrainBatch:
    """A batch whose scores are its row numbers."""
    return make_batch(rollouts(prompt_lengths, response_lengths), list(range(len(prompt_lengths))), "cpu")


def test_make_batch_by_hand():
    batch = batch_of([2, 1, 3], [1, 3, 2])
    assert batch.input_ids.tolist() == [[100, 101, 200, 0, 0], [102, 201, 202, 203, 0], [103, 104, 105, 204, 205]]
    assert batch.response_ids.tolist() == [[200, 0, 0], [201, 202, 203], [204, 205, 0]]
    assert batch.response_mask.int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert batch.engine_logprobs.tolist() == [[-1, 0, 0], [-2, -3, -4], [-5, -6, 0]]
    assert batch.predicts_response.int().tolist() == [[0, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert batch.targets.tolist() == [200, 201, 202, 203, 204, 205]
    assert batch.lengths.tolist() == [3, 4, 5] and batch.scores.tolist() == [0, 1, 2]
    assert batch.input_ids.dtype == torch.int64 and batch.scores.dtype == torch.float32


def test_an_environments_tokens_are_in_the_row_and_not_in_the_mask():
    generated = np.array([True, False, False, True, True, False, True])
    batch = make_batch(replace(rollouts([2, 1], [4, 3]), generated=generated), [0.0, 1.0], "cpu")
    assert batch.input_ids.tolist() == [[100, 101, 200, 201, 202, 203], [102, 204, 205, 206, 0, 0]]
    assert batch.response_mask.int().tolist() == [[1, 0, 0, 1], [1, 0, 1, 0]]
    assert batch.response_lengths.tolist() == [4, 3] and batch.lengths.tolist() == [6, 4]
    assert batch.engine_logprobs.tolist() == [[-1, 0, 0, -4], [-5, 0, -7, 0]]
    assert batch.targets.tolist() == [200, 203, 204, 206]
    assert batch.predicts_response.int().tolist() == [[0, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0]]
    part = batch.select(torch.tensor([1]))
    assert part.response_mask.int().tolist() == [[1, 0, 1]] and part.response_ids.tolist() == [[204, 205, 206]]


def test_select_takes_all_tensors_along_and_trims_the_padding():
    batch = batch_of([2, 1, 3], [1, 3, 2]).with_targets(torch.arange(9.0).view(3, 3), -torch.arange(9.0).view(3, 3))
    part = batch.select(torch.tensor([2, 0]))
    assert part.input_ids.tolist() == [[103, 104, 105, 204, 205], [100, 101, 200, 0, 0]]
    assert part.response_ids.tolist() == [[204, 205], [200, 0]]
    assert part.response_mask.int().tolist() == [[1, 1], [1, 0]]
    assert part.engine_logprobs.tolist() == [[-5, -6], [-1, 0]]
    assert part.advantages.tolist() == [[6, 7], [0, 1]] and part.returns.tolist() == [[-6, -7], [0, -1]]
    assert part.scores.tolist() == [2, 0] and part.prompt_lengths.tolist() == [3, 2]
    assert part.logprobs is None and len(part) == 2
    assert batch.select(torch.tensor([0])).input_ids.tolist() == [[100, 101, 200]]


@pytest.mark.parametrize(
    "prompt_lengths, response_lengths, scores, message",
    [
        ([2, 1], [1, 3], [0.5], "1 scores for 2 responses"),
        ([2, 1], [1, 0], [0.5, 1.0], "a token in each"),
        ([2, 0], [1, 1], [0.5, 1.0], "a token in each"),
        ([], [], [], "training needs a response"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_refused(prompt_lengths, response_lengths, scores, message: str):
    with pytest.raises(ValueError, match=message):
        make_batch(rollouts(prompt_lengths, response_lengths), scores, "cpu")


def rows_of(minibatches: list[TrainBatch]) -> list[list[int]]:
    return [minibatch.scores.int().tolist() for minibatch in minibatches]


def test_every_epoch_uses_every_row_once_in_near_equal_parts_and_a_new_order():
    rows = rows_of(list(batch_of([1] * 11, [1] * 11).minibatches(num_minibatches=3, epochs=2, seed=0)))
    assert [len(part) for part in rows] == [4, 4, 3, 4, 4, 3]
    first, second = sum(rows[:3], []), sum(rows[3:], [])
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second and first != list(range(11))


def test_the_responses_of_a_prompt_stay_together():
    # 8 prompts of 6 responses over 3 minibatches of 16: two of the prompts are cut, none is in three.
    batch = replace(batch_of([1] * 48, [1] * 48), groups=torch.arange(48) % 8)
    orders = []
    for parts in (list(batch.minibatches(3, 1, seed)) for seed in range(5)):
        prompts = [set(part.groups.tolist()) for part in parts]
        assert [len(part) for part in parts] == [16] * 3
        assert sum(map(len, prompts)) == 8 + 2
        assert all(sum(prompt in part for part in prompts) in (1, 2) for prompt in range(8))
        orders.append(rows_of(parts))
    assert len({str(order) for order in orders}) == 5


def test_the_order_follows_the_seed_alone():
    batch = batch_of([1] * 11, [1] * 11)
    state = torch.get_rng_state()
    same, again, other = (rows_of(list(batch.minibatches(2, 2, seed))) for seed in (5, 5, 6))
    assert same == again != other
    assert torch.equal(torch.get_rng_state(), state)  # the trainer's own random stream is not touched


def test_a_rank_with_fewer_rows_than_minibatches_yields_as_many_as_the_others():
    parts = batch_of([1] * 3, [1] * 3).minibatches(num_minibatches=4, epochs=2, seed=0)
    assert [len(part) for part in parts] == [1, 1, 1, 0] * 2


def test_microbatch_rows_by_hand():
    # Longest first: 7, 5, 5, 4, 2, 1. 7 alone (2 * 7 > 12); 5, 5 (3 * 5 > 12); 4, 2, 1 (3 * 4 <= 12).
    groups = microbatch_rows(torch.tensor([5, 2, 7, 4, 1, 5]), token_budget=12)
    assert [group.tolist() for group in groups] == [[2], [0, 5], [3, 1, 4]]


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), token_budget=st.integers(1, 200))
def test_micro_batches_keep_the_budget_and_every_row(lengths: list[int], token_budget: int):
    batch = batch_of([1] * len(lengths), lengths)
    parts = [batch.select(rows) for rows in microbatch_rows(batch.lengths, token_budget)]
    for part in parts:
        assert part.input_ids.numel() <= token_budget or len(part) == 1
        assert part.input_ids.shape[1] == part.lengths.max()  # no column of nothing but padding
    assert sorted(sum(rows_of(parts), [])) == list(range(len(lengths)))
    assert sum(part.response_mask.sum().item() for part in parts) == sum(lengths)


def test_unpack_puts_packed_tokens_back_and_lets_gradients_through():
    batch = batch_of([2, 1, 3], [1, 3, 2])
    packed = batch.targets.float().requires_grad_()
    padded = unpack(packed, batch.response_mask)
    assert torch.equal(padded, batch.response_ids.float())
    (padded * torch.arange(9.0).view(3, 3)).sum().backward()
    assert packed.grad.tolist() == [0, 3, 4, 5, 6, 7]  # the places of the tokens: 0 | 3 4 5 | 6 7
