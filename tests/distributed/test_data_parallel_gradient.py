"""Two ranks with half of the batch each, in uneven micro-batches, give the gradient of one whole batch.

What they must give is worked out here once more, from the full logits and in plain loops: one row at a time, one mean
over all tokens, none of the functions of trainers/ but the value head's module.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed import data_parallel_gradient_worker as worker
from tests.launch import launch

WORKER = Path(worker.__file__)
# Llama's norm and rotary embedding compute in float32 whatever the weights are; the rest is float64.
CLOSE = dict(rtol=1e-6, atol=1e-7)


def rows_of_whole_batch() -> list[tuple[list[int], int]]:
    """Each row's tokens and the length of its prompt."""
    batch = worker.rollouts(slice(None))
    return [([*row.prompt_ids.tolist(), *row.response_ids.tolist()], len(row.prompt_ids)) for row in batch]


def by_full_logits(language_model, value_head=None) -> tuple[list[torch.Tensor], ...]:
    """Log-probs, entropies and values of each row's response tokens, each row alone."""
    logprobs, entropies, values = [], [], []
    for tokens, prompt in rows_of_whole_batch():
        ids = torch.tensor(tokens)
        output = language_model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        log_p = torch.log_softmax(output.logits[0, prompt - 1 : -1] / worker.TEMPERATURE, dim=-1)
        logprobs.append(log_p.gather(1, ids[prompt:, None])[:, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
        if value_head is not None:
            values.append(value_head(output.hidden_states[-1][0, prompt - 1 : -1])[:, 0])
    return logprobs, entropies, values


def targets(old_logprobs, ref_logprobs, old_values) -> tuple[torch.Tensor, torch.Tensor]:
    """Whitened advantages and returns of all tokens."""
    advantages, returns = [], []
    for row, score in enumerate(worker.SCORES):
        values = [*old_values[row].tolist(), 0.0]
        rewards = (-worker.KL_COEF * (old_logprobs[row] - ref_logprobs[row])).tolist()
        rewards[-1] += score
        length = len(rewards)
        deltas = [rewards[t] + worker.GAMMA * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            decay = worker.GAMMA * worker.LAM
            advantages.append(sum(decay**k * deltas[t + k] for k in range(length - t)))
            returns.append(advantages[-1] + values[t])
    a = torch.tensor(advantages, dtype=torch.float64)
    return (a - a.mean()) / (a.var(correction=0) + 1e-8).sqrt(), torch.tensor(returns, dtype=torch.float64)


def one_big_batch() -> dict:
    policy = worker.old_policy()
    with torch.no_grad():
        old_logprobs, _, old_values = by_full_logits(policy.language_model, policy.value_head)
        ref_logprobs, _, _ = by_full_logits(worker.tiny_llama(seed=1))
    advantages, returns = targets(old_logprobs, ref_logprobs, old_values)
    worker.move(policy)
    logprobs, entropies, values = map(torch.cat, by_full_logits(policy.language_model, policy.value_head))
    old_values = torch.cat(old_values)

    ratio = (logprobs - torch.cat(old_logprobs)).exp()
    bounded = ratio.clamp(1 - worker.CLIP_RANGE, 1 + worker.CLIP_RANGE)
    policy_loss = -torch.minimum(ratio * advantages, bounded * advantages).mean()
    near = old_values + (values - old_values).clamp(-worker.VALUE_CLIP_RANGE, worker.VALUE_CLIP_RANGE)
    value_loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2
    loss = policy_loss + worker.VALUE_COEF * value_loss - worker.ENTROPY_COEF * entropies.mean()
    loss.backward()
    return {
        "gradients": {name: parameter.grad for name, parameter in policy.named_parameters()},
        "stats": {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropies.detach().mean(),
            "clip_fraction": ((ratio - 1).abs() > worker.CLIP_RANGE).double().mean(),
            "kl": (ratio - 1 - ratio.log()).detach().mean(),
        },
        "advantages": advantages,
    }


@pytest.mark.parametrize("nproc", [1, 2])
def test_any_number_of_ranks_gives_the_gradient_of_one_big_batch(nproc: int, tmp_path: Path):
    completed = launch([WORKER, tmp_path], nproc=nproc, timeout_s=120)
    assert completed.returncode == 0, completed.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(nproc)]
    expected = one_big_batch()

    assert 0.1 < expected["stats"]["clip_fraction"] < 0.9  # both sides of the clipping are at work
    if nproc == 2:
        assert [rank["num_micro_batches"] for rank in ranks] == [2, 4]
    torch.testing.assert_close(torch.cat([rank["advantages"] for rank in ranks]), expected["advantages"], **CLOSE)
    for rank in ranks:
        assert rank["stats"].keys() == expected["stats"].keys()
        for name, value in rank["stats"].items():
            torch.testing.assert_close(value, expected["stats"][name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}")
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in rank["gradients"].items():
            assert gradient.abs().max() > 1e-3, name
            torch.testing.assert_close(
                gradient, expected["gradients"][name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}"
            )
