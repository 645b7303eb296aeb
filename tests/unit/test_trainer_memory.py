"""What the planner says that training holds, against what torch's allocator is asked for while a learner learns.

A process group that moves nothing (torch's fake one) stands for the others' ranks: what is allocated is the same.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

import trainers.activations
import trainers.grpo
import trainers.learner
import trainers.policy
import trainers.ppo
from rollout import SamplingConfig
from trainers.activations import passes, rank_batch
from trainers.config import GRPOConfig, LoraConfig, ModelConfig, PPOConfig
from trainers.hyperparameters import GRPOHyperparameters, PPOHyperparameters
from trainers.learner import make_learner, optimize
from trainers.logprobs import token_logprobs
from trainers.lora import add_adapters
from trainers.model_sizes import adapters_in, count
from trainers.policy import Policy
from trainers.trainer_memory import Models, gradient_bytes, pass_bytes, precision_of, staying_bytes

BLOCK = 2**18
"""Logits at once: several blocks of the small vocabulary."""
PROMPTS, N, RESPONSE = [20, 22, 24, 26], 4, 30


def qwen2(tied: bool) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "ddp": {},
    "ddp, one pass": {"budget": 10**6, "kl_coef": 0.1},
    "ddp, checkpointing": {"gradient_checkpointing": True, "critic": True},
    "ddp, lora": {"rank": 8, "kl_coef": 0.1},
    "shards": {"sharding": "fsdp2", "kl_coef": 0.1},
    "shards, reduced once": {"sharding": "fsdp2", "reduce_gradients": "update"},
    "shards, float32": {"sharding": "fsdp2", "autocast": "no"},
    "shards, checkpointing": {"sharding": "fsdp2", "gradient_checkpointing": True},
    "shards, critic": {"sharding": "fsdp2", "critic": True},
    "shards, lora": {"rank": 8, "sharding": "fsdp2"},
    "shards, lora, bfloat16": {"rank": 8, "sharding": "fsdp2", "dtype": "bfloat16", "gradient_checkpointing": True},
}
QUICK = ("ddp", "shards, reduced once", "shards, float32", "shards, critic", "shards, lora")


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of shards eight, one of which is here; of DDP, whose every rank holds the same, one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if CASES[request.node.callspec.params["case"]].get("sharding") == "fsdp2":
        dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    else:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.get_world_size()
    AcceleratorState._reset_state(reset_partial_state=True)
    dist.destroy_process_group()


def experiment(rank: int | None = None, budget: int = 300, kl_coef: float = 0.0, critic: bool = False, **model: Any):
    shared: dict[str, Any] = {"sampling": SamplingConfig(max_tokens=RESPONSE, n=N), "lora": LoraConfig(rank=rank)}
    shared["model"] = ModelConfig(path="unused", **model)
    common: dict[str, Any] = {"micro_batch_tokens": budget, "minibatches": 1, "kl_coef": kl_coef}
    if critic:
        return PPOConfig(ppo=PPOHyperparameters(**common, critic="unused"), **shared)
    return GRPOConfig(grpo=GRPOHyperparameters(**common), **shared)


def held_and_peak(config: Any, tied: bool, in_ddp: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes that tensors have after a step, and at most in the next one.

    Args:
        in_ddp: True wraps the policy, as accelerate does in a job of several ranks.
    """
    dtype = getattr(torch, config.model.dtype)

    def built(kind: type = Qwen2ForCausalLM) -> Any:
        torch.manual_seed(0)
        model = kind(qwen2(tied)).to(dtype)
        model.set_attn_implementation("sdpa")
        return model

    monkeypatch.setattr(trainers.learner, "load_reference", lambda *_: Policy(built()).eval().requires_grad_(False))
    is_ppo = isinstance(config, PPOConfig)
    batch = rank_batch(PROMPTS, N, RESPONSE)
    nothing = torch.zeros(batch.response_mask.shape)
    batch = replace(batch, input_ids=batch.input_ids + 1, response_ids=batch.response_ids + 1)
    batch = replace(batch, values=nothing, ref_logprobs=nothing, logprobs=nothing).with_targets(nothing, nothing)
    loss = trainers.ppo.loss if is_ppo else trainers.grpo.loss
    gc.collect()  # what is left of another learner
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = built()
        if config.lora.rank:
            add_adapters(model, config.lora, "unused")
        critic = built(Qwen2Model) if is_ppo else None
        policy = Policy(model, is_ppo, critic).train()
        if config.model.gradient_checkpointing:
            for each in (model, critic):
                if each is not None:
                    each.gradient_checkpointing_enable({"use_reentrant": False})
        learner = make_learner(config, policy, torch.device("cpu"))
        if in_ddp:
            learner = replace(learner, ddp=DistributedDataParallel(policy, gradient_as_bucket_view=True))
            monkeypatch.setattr(learner.accelerator, "no_sync", DistributedDataParallel.no_sync)
        optimize(batch, learner, loss, config, step=0)
        with record_function("the next one"):
            optimize(batch, learner, loss, config, step=1)
    events = recorded.profiler.kineto_results.events()
    (start,) = (each.start_ns() for each in events if each.name() == "the next one")
    now = held = most = 0
    for each in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        now += each.nbytes()
        if each.start_ns() < start:
            held = now
        else:
            most = max(most, now)
    return held, most


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_what_a_learner_takes(case: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.activations, "BLOCK_ELEMENTS", BLOCK)
    monkeypatch.setattr(trainers.policy, "token_logprobs", partial(token_logprobs, block_elements=BLOCK))
    config, tied, in_ddp = experiment(**CASES[case]), len(case) % 2 == 0, case.startswith("ddp")
    held, most = held_and_peak(config, tied, in_ddp, monkeypatch)
    ranks += in_ddp  # of any number the same
    sizes = count(qwen2(tied))
    models = Models(
        sizes,
        sizes.as_critic() if isinstance(config, PPOConfig) else None,
        reference=bool(config.algorithm.kl_coef),
        adapters=adapters_in(Qwen2ForCausalLM(qwen2(tied)), config.lora),
    )
    precision = precision_of(config, on_cpu=True)
    steps = passes(rank_batch(PROMPTS, N, RESPONSE), config.algorithm.micro_batch_tokens, packed=True)
    largest = max(steps, key=lambda step: step.tokens)
    stays = staying_bytes(config, models, precision, ranks)
    gradients = gradient_bytes(config, models, precision, ranks, len(steps))
    assert sum(stays.values()) == pytest.approx(held, rel=0.01)
    planned = sum((stays | {"gradients": gradients} | pass_bytes(config, models, largest, precision)).values())
    assert planned == pytest.approx(most, rel=0.06)
