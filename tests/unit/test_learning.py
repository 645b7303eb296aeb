"""scripts/learning.py: what counts as learned, and that each break breaks what it says."""

import pytest
import torch

import trainers.grpo
import trainers.policy
import trainers.ppo
from rollout import RolloutEngine
from scripts.learning import BREAKS, Learned, table
from tests.unit.test_packing import batch_of, llama  # noqa: F401 (a fixture)
from trainers.config import GRPOConfig


def learned(rewards: list[float], after: float) -> Learned:
    return Learned("grpo", 0, "", rewards, before=0.1, after=after, minutes=4.0)


def test_both_figures_have_to_be_reached():
    assert learned([0.0] * 5 + [0.8] * 5, after=0.7).reached
    assert not learned([0.0] * 5 + [0.79] * 5, after=0.7).reached
    assert not learned([0.9] * 10, after=0.69).reached
    assert "| 0.00 -> 0.80 | 0.10 -> 0.70 | 4.0 | yes |" in table([learned([0.0] * 5 + [0.8] * 5, after=0.7)])


def test_turned_advantages(monkeypatch: pytest.MonkeyPatch):
    batch = batch_of([(3, 2), (3, 1)])
    batch.scores[0] = 1.0
    whole = trainers.grpo.targets(batch, GRPOConfig()).advantages
    for module in (trainers.ppo, trainers.grpo):
        monkeypatch.setattr(module, "targets", module.targets)  # put back afterwards
    BREAKS["advantages turned"]()
    assert whole.any() and torch.equal(trainers.grpo.targets(batch, GRPOConfig()).advantages, -whole)


def test_a_moved_mask(monkeypatch: pytest.MonkeyPatch, llama):  # noqa: F811
    batch = batch_of([(3, 2), (1, 3)])
    whole = trainers.policy.response_hidden_states(llama, batch)
    monkeypatch.setattr(trainers.policy, "response_hidden_states", trainers.policy.response_hidden_states)
    BREAKS["mask moved by one"]()
    assert torch.equal(trainers.policy.response_hidden_states(llama, batch), whole.roll(1, dims=0))


def test_a_stale_engine(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(RolloutEngine, "sync_weights", lambda engine, policy, version: seen.append(version) or version)
    BREAKS["stale engine"]()
    engine = object.__new__(RolloutEngine)
    assert [engine.sync_weights(None, version=version) for version in (5, 6)] == [5, 5] and seen == [5]
