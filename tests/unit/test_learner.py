"""The optimizer's groups, and gradients that are not finite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from trainers.config import OptimizerConfig, PPOConfig
from trainers.learner import Learner, clip_gradients, make_learner
from trainers.policy import load_policy


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def learner_of(path: Path, config: PPOConfig) -> Learner:
    """With a critic of its own."""
    return make_learner(config, load_policy(str(path), "float32", False, True, str(path)), torch.device("cpu"))


@pytest.mark.parametrize(("given", "rate"), [(None, 3e-6), (0.0, 0.0), (1e-5, 1e-5)])
def test_the_critic_learns_at_its_own_rate(small_vocabulary_model_path: Path, given: float | None, rate: float) -> None:
    config = PPOConfig(optimizer=OptimizerConfig(learning_rate=3e-6, value_learning_rate=given))
    groups = learner_of(small_vocabulary_model_path, config).optimizer.param_groups
    assert [group["lr"] for group in groups] == [3e-6, rate]


@pytest.mark.parametrize(("broken", "name"), [("language_model", "grad_norm"), ("critic", "value_grad_norm")])
def test_a_gradient_that_is_not_finite_stops_the_run(small_vocabulary_model_path: Path, broken: str, name: str) -> None:
    config = PPOConfig()
    learner = learner_of(small_vocabulary_model_path, config)
    for parameter in learner.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    clip_gradients(learner, config)
    next(getattr(learner.policy, broken).parameters()).grad.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=f"^train/{name} is nan"):
        clip_gradients(learner, config)
