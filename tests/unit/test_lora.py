"""A policy with adapters: what trains, what the reference is, what a checkpoint and an export hold."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout import RolloutBatch
from trainers.batching import TrainBatch, make_batch
from trainers.checkpoint import TENSORS, About, load, read_about, save
from trainers.config import GRPOConfig, LoraConfig, PPOConfig
from trainers.errors import ConfigError
from trainers.export import export_checkpoint, export_policy
from trainers.hyperparameters import GRPOHyperparameters
from trainers.learner import make_learner
from trainers.lora import check_target_modules, without_adapters
from trainers.no_grad_pass import no_grad_pass
from trainers.policy import Policy, load_policy, load_reference

LORA = LoraConfig(rank=4, alpha=6.0)
DROPPED = replace(LORA, dropout=0.5)
ADAPTERS = ("lora_A", "lora_B")


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def path(small_vocabulary_model_path: Path) -> str:
    return str(small_vocabulary_model_path)


def policy_of(path: str, lora: LoraConfig | None = LORA, seed: int = 0, **given: Any) -> Policy:
    torch.manual_seed(seed)
    return load_policy(path, given.pop("dtype", "float32"), lora=lora, **given)


def train_a_little(policy: Policy, seed: int = 1) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


def batch() -> TrainBatch:
    prompts, responses = [3, 1, 5], [4, 6, 2]
    random = np.random.default_rng(0)
    rollouts = RolloutBatch(
        prompt_ids=random.integers(1, 37, sum(prompts), np.int32),
        prompt_lengths=np.array(prompts, np.int32),
        response_ids=random.integers(1, 37, sum(responses), np.int32),
        response_lengths=np.array(responses, np.int32),
        logprobs=np.zeros(sum(responses), np.float32),
        finished=np.ones(3, bool),
        prompt_index=np.arange(3, dtype=np.int32),
        version=0,
    )
    return make_batch(rollouts, [0.0] * 3, "cpu")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(16)[None]).logits


# What trains


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_train_in_float32_and_change_nothing_at_first(path: str, dtype: str) -> None:
    policy = policy_of(path, dtype=dtype)
    trained = {name: each for name, each in policy.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * 2 * 7, "A and B of two layers' seven matrices"
    assert all(any(part in name for part in ADAPTERS) and each.dtype == torch.float32 for name, each in trained.items())
    frozen = {name: each.dtype for name, each in policy.named_parameters() if name not in trained}
    assert set(frozen.values()) == {getattr(torch, dtype)}
    assert torch.equal(policy(batch()).logprobs, policy_of(path, None, dtype=dtype)(batch()).logprobs)
    assert policy.packs and policy.training


def test_targets_by_name(path: str) -> None:
    policy = policy_of(path, replace(LORA, target_modules=["v_proj", "layers.1.mlp.up_proj"]))
    layers = {name.split(".lora_")[0] for name, each in policy.named_parameters() if each.requires_grad}
    ends = ["layers.0.self_attn.v_proj", "layers.1.mlp.up_proj", "layers.1.self_attn.v_proj"]
    assert sorted(layers) == [f"language_model.model.{end}" for end in ends]


@pytest.mark.parametrize("wrong", ["q_prj", "lm_head", "embed_tokens", "mlp"])
def test_a_name_that_is_no_linear_layer_of_the_trunk_is_refused_before_a_weight_is_read(path: str, wrong: str) -> None:
    lora = replace(LORA, target_modules=["v_proj", wrong])
    with pytest.raises(ConfigError, match=f"lora.target_modules has '{wrong}'.*there are down_proj, gate_proj, k_proj"):
        check_target_modules(path, lora)
    with pytest.raises(ConfigError, match=wrong):
        policy_of(path, lora)
    check_target_modules(path, LORA)
    check_target_modules("nowhere", LoraConfig())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha is 0.0"),
        ({"rank": 4, "dropout": 1.0}, "lora.dropout is 1.0"),
        ({"rank": 4, "target_modules": [""]}, "empty name"),
        ({"target_modules": ["q_proj"]}, "lora.rank is null.*set lora.rank=16"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**given)


def test_gradients_reach_every_adapter_and_nothing_else(path: str) -> None:
    policy = train_a_little(policy_of(path, gradient_checkpointing=True, with_values=True))
    output = policy(batch(), entropy=True)
    sum(each.square().sum() for each in output).backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.any(), name


def test_the_optimizer_has_adapters_value_head_and_the_whole_of_a_critic(path: str) -> None:
    for critic, matrices in ((None, 0), (path, 2 * 7 + 1 + 5)):
        policy = policy_of(path, with_values=True, critic_path=critic)
        learner = make_learner(PPOConfig(lora=LORA), policy, torch.device("cpu"))
        of_policy, of_critic = (group["params"] for group in learner.optimizer.param_groups)
        assert len(of_policy) == 28 and all(each.requires_grad for each in of_policy)
        assert len(of_critic) == 2 + matrices and all(each.requires_grad for each in of_critic)


# Dropout


def test_dropout_is_on_in_passes_with_gradient_and_off_without(path: str) -> None:
    policy = train_a_little(policy_of(path, DROPPED))
    assert not torch.equal(policy(batch()).logprobs, policy(batch()).logprobs)
    old = no_grad_pass(batch(), policy, policy, 1.0, 1000)
    again = no_grad_pass(batch(), policy, policy, 1.0, 1000)
    assert torch.equal(old.logprobs, again.logprobs) and torch.equal(old.ref_logprobs, again.ref_logprobs)
    undropped = train_a_little(policy_of(path, LORA))
    assert torch.equal(old.logprobs[batch().response_mask], undropped(batch()).logprobs)
    assert policy.training and all(module.training for module in policy.modules())


def test_with_dropout_the_old_log_probs_are_always_wanted() -> None:
    single = GRPOHyperparameters(minibatches=1)
    assert not GRPOConfig(grpo=single, lora=LORA).needs_old_logprobs
    assert GRPOConfig(grpo=single, lora=DROPPED).needs_old_logprobs
    assert GRPOConfig(grpo=replace(single, epochs=2)).needs_old_logprobs


# The reference


def test_the_reference_is_the_first_policy_to_the_last_bit(path: str) -> None:
    policy = train_a_little(policy_of(path, DROPPED))
    before = [each.requires_grad for each in policy.parameters()]
    hyper = GRPOHyperparameters(kl_coef=0.1)
    learner = make_learner(GRPOConfig(lora=DROPPED, grpo=hyper), policy, torch.device("cpu"))
    assert learner.reference is policy, "no second model"
    passed = no_grad_pass(batch(), policy, learner.reference, 0.7, 1000)
    reference = load_reference(path, "float32")
    with learner.accelerator.autocast():  # as every pass of a policy goes that accelerate has prepared
        expected = no_grad_pass(batch(), policy, reference, 0.7, 1000)
    assert torch.equal(passed.ref_logprobs, expected.ref_logprobs)
    assert not torch.allclose(passed.logprobs, passed.ref_logprobs, atol=1e-3)
    assert [each.requires_grad for each in policy.parameters()] == before


def test_adapters_are_back_after_an_error(path: str) -> None:
    policy = train_a_little(policy_of(path))
    before = logits(policy.language_model)
    with pytest.raises(ZeroDivisionError), without_adapters(policy.language_model):
        assert torch.equal(logits(policy.language_model), logits(policy_of(path, None).language_model))
        raise ZeroDivisionError
    assert torch.equal(logits(policy.language_model), before) and not torch.equal(
        before, logits(policy_of(path, None).language_model)
    )


# Checkpoints and exports


def learner_of(path: str, seed: int, updates: int, lora: LoraConfig = LORA) -> Any:
    policy = policy_of(path, lora, seed, with_values=True)
    trained = [each for each in policy.parameters() if each.requires_grad]
    made = SimpleNamespace(
        policy=policy, optimizer=torch.optim.AdamW(trained, lr=0.01), accelerator=SimpleNamespace(scaler=None)
    )
    for _ in range(updates):
        update(made)
    return made


def update(made: Any) -> None:
    output = made.policy(batch())
    (output.logprobs.sum() + output.values.sum()).backward()
    made.optimizer.step()
    made.optimizer.zero_grad()


def about(path: str, lora: LoraConfig = LORA) -> About:
    config = {"model": {"path": path, "dtype": "float32"}, "rollout": {"dtype": "bfloat16"}, "lora": vars(lora)}
    return About(2, 16, 1, "ppo", config, {})


def test_a_checkpoint_holds_what_trains_and_the_run_goes_on_to_the_last_bit(path: str, tmp_path: Path) -> None:
    ours, theirs = learner_of(path, 0, 2, DROPPED), learner_of(path, 7, 0, DROPPED)
    folder = save(tmp_path, about(path), ours, keep=2, private=True)
    names = {name for file in (folder / TENSORS).iterdir() for name in load_file(file)}
    of_policy = [name for name in names if name.startswith("policy.")]
    assert len(of_policy) == 28 + 2 and all("lora_" in name or "value_head" in name for name in of_policy)
    load(folder, read_about(folder), theirs, seed=0)  # the masks that dropout draws next, too
    update(theirs)
    after = [each.clone() for each in theirs.policy.parameters()]
    load(folder, read_about(folder), ours, seed=0)
    update(ours)
    assert all(torch.equal(*pair) for pair in zip(ours.policy.parameters(), after, strict=True))


def test_a_checkpoint_of_another_rank_is_not_read(path: str, tmp_path: Path) -> None:
    folder = save(tmp_path, about(path), learner_of(path, 0, 1), keep=2, private=True)
    with pytest.raises(ConfigError, match="of another model"):
        load(folder, read_about(folder), learner_of(path, 0, 1, replace(LORA, rank=2)), seed=0)


@pytest.fixture
def tokenizer(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_a_model_like_any_other_with_the_adapter_beside_it(
    tied: bool, tiny_model_path: Path, path: str, tokenizer: Any, tmp_path: Path
) -> None:
    base = str(tiny_model_path) if tied else path
    policy = train_a_little(policy_of(base))
    export_policy(tmp_path, policy.language_model, tokenizer, "float32")
    expected = logits(policy.language_model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in load_file(tmp_path / "model.safetensors"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), expected, rtol=1e-2, atol=1e-2)


def test_a_checkpoint_exports_what_the_end_of_its_run_would(
    tiny_model_path: Path, tokenizer: Any, tmp_path: Path
) -> None:
    base = str(tiny_model_path)
    made = learner_of(base, 3, 2)
    (tmp_path / "run").mkdir()
    folder = save(tmp_path / "run", about(base), made, keep=2, private=True)
    export_policy(tmp_path / "end", made.policy.language_model, tokenizer, "bfloat16")
    assert export_checkpoint(folder, tmp_path / "out") == 2
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "end" / name).read_bytes(), name
