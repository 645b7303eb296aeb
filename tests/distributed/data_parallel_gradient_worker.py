"""The gradient of one PPO update, from this rank's share of 8 rows, made as trainers/ppo.py makes it and saved.

torchrun --nproc-per-node=2 tests/distributed/data_parallel_gradient_worker.py <folder for the results>
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from rollout import RolloutBatch
from trainers.across_ranks import count_over_ranks, sum_over_ranks, undo_ddp_mean
from trainers.advantages import gae, token_rewards, whiten
from trainers.batching import make_batch, unpack
from trainers.evaluate import evaluate
from trainers.losses import entropy_bonus, ppo_policy_loss, value_loss
from trainers.policy import PolicyWithValue

# Two ranks take four rows each: the first all short ones (7 response tokens), the second all long ones (32).
PROMPTS = [2, 1, 3, 2, 4, 5, 3, 6]
RESPONSES = [1, 2, 1, 3, 9, 7, 11, 5]
SCORES = [1.0, 0.0, 0.5, -1.0, 2.0, 0.0, 1.0, 3.0]
TOKEN_BUDGET = 16  # rank 0 needs two micro-batches (5 x 3 and 3 x 1 tokens), rank 1 four of a row each
TEMPERATURE, KL_COEF, GAMMA, LAM = 0.8, 0.1, 0.98, 0.9
CLIP_RANGE, VALUE_CLIP_RANGE, VALUE_COEF, ENTROPY_COEF = 0.2, 0.3, 0.5, 0.01


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """A random model in float64, its logits far from flat; its embedding is its head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double()


def old_policy() -> PolicyWithValue:
    policy = PolicyWithValue(tiny_llama(seed=0))
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


def move(policy: PolicyWithValue) -> None:
    """What earlier updates of the step would have done, so that ratios leave 1 and some are clipped."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def rollouts(rows: slice) -> RolloutBatch:
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 37, length, np.int32) for length in PROMPTS][rows]
    responses = [random.integers(1, 37, length, np.int32) for length in RESPONSES][rows]
    lengths = np.array([len(ids) for ids in responses], np.int32)
    return RolloutBatch(
        prompt_ids=np.concatenate(prompts),
        prompt_lengths=np.array([len(ids) for ids in prompts], np.int32),
        response_ids=np.concatenate(responses),
        response_lengths=lengths,
        logprobs=np.zeros(lengths.sum(), np.float32),
        finished=np.ones(len(lengths), bool),
        prompt_index=np.arange(len(lengths), dtype=np.int32),
        version=0,
    )


def update(accelerator: Accelerator) -> dict:
    """This rank's gradients, statistics, advantages and number of micro-batches."""
    share = len(SCORES) // accelerator.num_processes
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    policy = old_policy()
    model = accelerator.prepare(policy)

    batch = make_batch(rollouts(rows), SCORES[rows], accelerator.device)
    batch = evaluate(batch, policy, tiny_llama(seed=1), TEMPERATURE, TOKEN_BUDGET)
    rewards = token_rewards(batch.scores, batch.logprobs, batch.ref_logprobs, batch.response_mask, KL_COEF)
    advantages, returns = gae(rewards, batch.values, batch.response_mask, GAMMA, LAM)
    batch = batch.with_targets(whiten(advantages, batch.response_mask), returns)
    move(policy)

    (minibatch,) = batch.minibatches(num_minibatches=1, epochs=1, seed=0)
    num_tokens = count_over_ranks(minibatch.response_mask)
    totals: dict[str, torch.Tensor] = {}
    micro_batches = minibatch.microbatches(TOKEN_BUDGET)
    for index, micro in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            output = model(micro.input_ids, micro.predicts_response, micro.targets, TEMPERATURE, entropy=True)
            mask = micro.response_mask
            logprobs, entropy, values = (unpack(packed, mask) for packed in output)
            policy_part, policy_stats = ppo_policy_loss(
                logprobs, micro.logprobs, micro.advantages, mask, CLIP_RANGE, num_tokens
            )
            value_part, value_stats = value_loss(
                values, micro.values, micro.returns, mask, VALUE_CLIP_RANGE, num_tokens
            )
            bonus, bonus_stats = entropy_bonus(entropy, mask, num_tokens)
            accelerator.backward(undo_ddp_mean(policy_part + VALUE_COEF * value_part - ENTROPY_COEF * bonus))
        for name, part in (policy_stats | value_stats | bonus_stats).items():
            totals[name] = totals.get(name, 0.0) + part

    return {
        "gradients": {name: parameter.grad for name, parameter in policy.named_parameters()},
        "stats": {name: sum_over_ranks(total) for name, total in totals.items()},
        "advantages": batch.advantages[batch.response_mask],
        "num_micro_batches": len(micro_batches),
    }


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.save(update(accelerator), folder / f"rank{accelerator.process_index}.pt")
    # DDP's wrapper has to go before the process group does. If it holds the group's last reference, the group joins its
    # threads with the interpreter's lock held, and a gloo thread that wants that lock to end never gets it.
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
