"""The passes before the first update: the rows' own order, whatever the micro-batches, and nothing left behind."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rollout import RolloutBatch
from trainers.batching import TrainBatch, make_batch, unpack
from trainers.no_grad_pass import no_grad_pass
from trainers.policy import Policy

PROMPTS, RESPONSES = [3, 1, 5, 2, 4], [4, 6, 1, 9, 2]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).double()


@pytest.fixture
def policy() -> Policy:
    policy = Policy(tiny_llama(0), with_values=True)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


@pytest.fixture
def batch() -> TrainBatch:
    random = np.random.default_rng(0)
    rollouts = RolloutBatch(
        prompt_ids=random.integers(1, 37, sum(PROMPTS), np.int32),
        prompt_lengths=np.array(PROMPTS, np.int32),
        response_ids=random.integers(1, 37, sum(RESPONSES), np.int32),
        response_lengths=np.array(RESPONSES, np.int32),
        logprobs=np.zeros(sum(RESPONSES), np.float32),
        finished=np.ones(5, bool),
        prompt_index=np.arange(5, dtype=np.int32),
        version=0,
    )
    return make_batch(rollouts, [0.0] * 5, "cpu")


@pytest.mark.parametrize("token_budget", [1, 20, 1000])  # 5, several, and 1 micro-batch
def test_rows_keep_their_order_in_any_micro_batches(policy: Policy, batch: TrainBatch, token_budget: int):
    reference = Policy(tiny_llama(1))
    passed = no_grad_pass(batch, policy, reference, temperature=0.7, token_budget=token_budget)
    for row in range(len(batch)):
        alone = batch.select(torch.tensor([row]))
        output, length = policy(alone, 0.7), RESPONSES[row]
        for ours, expected in (
            (passed.logprobs, output.logprobs),
            (passed.values, output.values),
            (passed.ref_logprobs, reference(alone, 0.7).logprobs),
        ):
            torch.testing.assert_close(ours[row, :length], expected, rtol=1e-6, atol=1e-6)
            assert ours.shape == batch.response_mask.shape and not ours[row, length:].any()
    assert (passed.logprobs - passed.ref_logprobs)[batch.response_mask].abs().min() > 1e-6


def test_without_a_reference_there_are_no_reference_log_probs(policy: Policy, batch: TrainBatch):
    passed = no_grad_pass(batch, policy, None, temperature=1.0, token_budget=1000)
    assert passed.ref_logprobs is None and batch.logprobs is None  # and the batch given stays as it was


def test_nothing_requires_grad_and_the_loss_can_still_save_it(policy: Policy, batch: TrainBatch):
    """Tensors of torch.inference_mode could not be saved for the update's backward pass."""
    passed = no_grad_pass(batch, policy, None, temperature=1.0, token_budget=20)
    assert not passed.logprobs.requires_grad and not passed.values.requires_grad
    output = policy(batch)
    (unpack(output.logprobs, batch.response_mask) * passed.logprobs).sum().backward()
    assert policy.language_model.lm_head.weight.grad.any()
