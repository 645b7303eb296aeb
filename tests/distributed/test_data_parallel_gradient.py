"""Two ranks with half of the batch each, in uneven micro-batches, give the gradient of one whole batch; also in shards.

What they must give is worked out here once more, from the full logits and in plain loops: one row at a time, one mean
at the end, none of the functions of trainers/ but the value head's module. Where an environment spoke in between, its
tokens are context and nothing else: what is worked out here never sees a number of theirs.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed import data_parallel_gradient_worker as worker
from tests.launch import launch

WORKER = Path(worker.__file__)
# Llama's norm and rotary embedding compute in float32 whatever the weights are; the rest is float64.
CLOSE = dict(rtol=1e-6, atol=1e-7)
ESTIMATE = {"k1": lambda r: -r, "k2": lambda r: r**2 / 2, "k3": lambda r: torch.exp(r) - 1 - r}


def rows_of_whole_batch() -> list[tuple[list[int], int]]:
    """Each row's tokens and the length of its prompt."""
    batch = worker.rollouts(slice(None))
    return [([*row.prompt_ids.tolist(), *row.response_ids.tolist()], len(row.prompt_ids)) for row in batch]


def by_full_logits(case, language_model, value_head=None, critic=None) -> tuple[list[torch.Tensor], ...]:
    """Log-probs, entropies and values of each row's sampled tokens, each row alone."""
    logprobs, entropies, values = [], [], []
    for (tokens, prompt), mask in zip(rows_of_whole_batch(), worker.sampled(case), strict=True):
        ids, mask = torch.tensor(tokens), torch.tensor(mask)
        output = language_model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        log_p = torch.log_softmax(output.logits[0, prompt - 1 : -1] / worker.TEMPERATURE, dim=-1)
        logprobs.append(log_p.gather(1, ids[prompt:, None])[mask, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1)[mask])
        if value_head is not None:
            hidden = critic(input_ids=ids[None])[0] if critic is not None else output.hidden_states[-1]
            values.append(value_head(hidden[0, prompt - 1 : -1])[mask, 0])
    return logprobs, entropies, values


def of_policy(case, policy) -> tuple[list[torch.Tensor], ...]:
    return by_full_logits(case, policy.language_model, policy.value_head, policy.critic)


def token_rewards(hyper, sampled, ref_logprobs) -> list[list[float]]:
    """The score on the last token, less a KL penalty on each where the rewards hold it."""
    rewards = []
    for row, score in enumerate(worker.SCORES):
        penalty = ESTIMATE["k1"](ref_logprobs[row] - sampled[row])
        of_row = (-hyper.kl_coef * penalty * (hyper.kl_in == "reward")).tolist()
        of_row[-1] += score
        rewards.append(of_row)
    return rewards


def gae(hyper, rewards, old_values) -> tuple[list[float], list[float]]:
    advantages, returns = [], []
    for row, of_row in enumerate(rewards):
        values = [*old_values[row].tolist(), 0.0]
        length = len(of_row)
        deltas = [of_row[t] + hyper.gamma * values[t + 1] - values[t] for t in range(length)]
        for t in range(length):
            decay = hyper.gamma * hyper.lam
            advantages.append(sum(decay**k * deltas[t + k] for k in range(length - t)))
            returns.append(advantages[-1] + values[t])
    return advantages, returns


def of_groups(hyper, rewards) -> list[float]:
    """A response's advantage over its group, once for each of its tokens."""
    totals, advantages = [sum(of_row) for of_row in rewards], []
    for row, of_row in enumerate(rewards):
        mates = [total for total, group in zip(totals, worker.GROUPS, strict=True) if group == worker.GROUPS[row]]
        mean = sum(mates) / len(mates)
        advantage = totals[row] - mean
        if hyper.advantage == "grpo":
            advantage /= (sum((mate - mean) ** 2 for mate in mates) / (len(mates) - 1)) ** 0.5 + 1e-6
        if hyper.advantage == "rloo":
            advantage = totals[row] - (sum(mates) - totals[row]) / (len(mates) - 1)
        advantages += [advantage] * len(of_row)
    return advantages


def whitened(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt()


def expected_targets(hyper, rewards, old_values) -> tuple[torch.Tensor, torch.Tensor]:
    if old_values:
        advantages, returns = (torch.tensor(x, dtype=torch.float64) for x in gae(hyper, rewards, old_values))
        return whitened(advantages), returns
    if hyper.advantage == "reinforce_pp":
        to_go = [sum(of_row[t:]) for of_row in rewards for t in range(len(of_row))]
        return whitened(torch.tensor(to_go, dtype=torch.float64)), torch.zeros(0)
    return torch.tensor(of_groups(hyper, rewards), dtype=torch.float64), torch.zeros(0)


def engine_weights(hyper, old: list[torch.Tensor], engine: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token, what its loss is multiplied by; and True where a bound was passed."""
    weights, (low, high) = [], hyper.mismatch_bounds
    for of_trainer, of_engine in zip(old, engine, strict=True):
        gap = of_trainer - of_engine
        weights.append((gap if hyper.mismatch_level == "token" else gap.sum().expand(len(gap))).exp())
    ratio = torch.cat(weights)
    if hyper.mismatch == "truncate":
        return ratio.clamp(max=high), ratio > high
    outside = (ratio < low) | (ratio > high)
    return ratio * ~outside, outside


def mean_over(case: str, x: torch.Tensor) -> torch.Tensor:
    """Of the tokens of the whole batch, as the config asks for it."""
    hyper, lengths = worker.HYPERPARAMETERS[case], [sum(mask) for mask in worker.sampled(case)]
    if hyper.loss_mean == "token":
        return x.sum() / sum(lengths)
    if hyper.loss_mean == "sequence":
        return torch.stack([row.mean() for row in x.split(lengths)]).mean()
    return x.sum() / (len(lengths) * worker.MAX_TOKENS)


def one_big_batch(case: str) -> dict:
    hyper, policy = worker.HYPERPARAMETERS[case], worker.old_policy(case)
    with torch.no_grad():
        old, _, old_values = of_policy(case, policy)
        # Of a policy with adapters: the model that it was before they were put in.
        reference, _, _ = by_full_logits(case, worker.tiny_llama(seed=0 if case == "ppo_lora" else 1))
    noise = [worker.disagreement()[row, : len(mask)][mask] for row, mask in enumerate(worker.sampled(case))]
    engine = [logprobs + of_row for logprobs, of_row in zip(old, noise, strict=True)]
    advantages, returns = expected_targets(hyper, token_rewards(hyper, old, reference), old_values)
    worker.move(policy)
    logprobs, entropies, values = (torch.cat(x) if x else None for x in of_policy(case, policy))

    ratio = (logprobs - torch.cat(engine if hyper.old_logprobs == "engine" else old)).exp()
    bounded = ratio.clamp(1 - hyper.clip_range, 1 + (hyper.clip_range_high or hyper.clip_range))
    gain = torch.minimum(ratio * advantages, bounded * advantages)
    if hyper.dual_clip:
        gain = torch.where(advantages < 0, torch.maximum(gain, hyper.dual_clip * advantages), gain)
    gap = (torch.cat(old) - torch.cat(engine)).abs()
    stats = {
        "clip_fraction": ((ratio < 1 - hyper.clip_range) | (ratio > bounded.max())).double().mean(),
        "kl": ESTIMATE["k3"](ratio.log()).detach().mean(),
        "entropy": entropies.detach().mean(),
        "logprob_gap_mean": gap.mean(),
        "logprob_gap_max": gap.max(),
    }
    if hyper.mismatch != "no":
        weights, cut = engine_weights(hyper, old, engine)
        gain = gain * weights
        stats |= {"mismatch_weight": weights.mean(), "mismatch_cut": cut.double().mean()}
    policy_loss = -mean_over(case, gain)
    loss = policy_loss - hyper.entropy_coef * entropies.mean()
    estimate = ESTIMATE[hyper.estimator](torch.cat(reference) - logprobs)
    stats["kl_ref"] = estimate.detach().mean()
    if hyper.kl_in == "loss":
        loss = loss + hyper.kl_coef * mean_over(case, estimate)
    if values is not None:
        before = torch.cat(old_values)
        near = before + (values - before).clamp(-hyper.value_clip_range, hyper.value_clip_range)
        value_loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2
        loss = loss + hyper.value_coef * value_loss
        stats["value_loss"] = value_loss.detach()
    loss.backward()
    stats |= {"policy_loss": policy_loss.detach(), "loss": loss.detach()} | norms(policy)
    gradients = {name: each.grad for name, each in policy.named_parameters() if each.requires_grad}
    return {"gradients": gradients, "stats": stats, "advantages": advantages}


def norms(policy) -> dict[str, torch.Tensor]:
    def norm(parameters) -> torch.Tensor:
        squares = [parameter.grad.square().sum() for parameter in parameters if parameter.requires_grad]
        return torch.stack(squares).sum().sqrt()

    if policy.critic is None:
        return {"grad_norm": norm(policy.parameters())}
    of_critic = [*policy.critic.parameters(), *policy.value_head.parameters()]
    return {"grad_norm": norm(policy.language_model.parameters()), "value_grad_norm": norm(of_critic)}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    completed = launch([WORKER, folder], nproc=request.param, timeout_s=120)
    assert completed.returncode == 0, completed.stderr
    return folder


@pytest.fixture(params=["whole", "sharded"])
def of_ranks(folder: Path, request: pytest.FixtureRequest) -> list[dict]:
    return [torch.load(file) for file in sorted(folder.glob(f"{request.param}*.pt"))]


@pytest.mark.parametrize("case", worker.HYPERPARAMETERS)
def test_any_number_of_ranks_gives_the_gradient_of_one_big_batch(case: str, of_ranks: list[dict]):
    ranks, expected = [updates[case] for updates in of_ranks], one_big_batch(case)

    assert 0.1 < expected["stats"]["clip_fraction"] < 0.9  # both sides of the clipping are at work
    if "mismatch_cut" in expected["stats"]:
        assert 0.05 < expected["stats"]["mismatch_cut"] < 0.95
    if len(ranks) == 2:
        assert [rank["num_micro_batches"] for rank in ranks] == [2, 4]
    torch.testing.assert_close(torch.cat([rank["advantages"] for rank in ranks]), expected["advantages"], **CLOSE)
    for rank in ranks:
        assert rank["stats"].keys() == expected["stats"].keys()
        for name, value in rank["stats"].items():
            assert value == pytest.approx(expected["stats"][name].item(), rel=1e-6, abs=1e-7), name
        assert rank["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in rank["gradients"].items():
            assert gradient.abs().max() > 1e-3, name
            torch.testing.assert_close(
                gradient, expected["gradients"][name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}"
            )
