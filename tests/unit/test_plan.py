"""The planner's arithmetic: sizes against real models, memory and time by hand, device files, advice, arguments."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

from scripts.plan import arguments, config_of, prompt_lengths
from scripts.planning.planner import Plan, make_plan
from scripts.planning.tables import json_of, text_of
from tests.unit.test_activations import MODELS
from trainers.activations import Pass, Shape, passes, rank_batch
from trainers.config import (
    EnvironmentConfig,
    GRPOConfig,
    LoraConfig,
    ModelConfig,
    PartialConfig,
    PPOConfig,
    RolloutConfig,
    SamplingConfig,
)
from trainers.devices import FOLDER, Device, device_names, load_device, parse_device
from trainers.errors import ConfigError
from trainers.hyperparameters import GRPOHyperparameters, PPOHyperparameters
from trainers.memory_plan import GIB, Cache, engine_shard, kv_cache, kv_token_bytes
from trainers.model_sizes import ModelSizes, count
from trainers.step_time import Load, bottleneck, generate_seconds, parts_of, plan_time
from trainers.trainer_memory import Models

CPU = load_device("cpu")[0]
H100_MODEL = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def sizes() -> ModelSizes:
    return count(MODELS["llama"][1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that has nothing but a config: the planner asks for no more."""
    made = tmp_path_factory.mktemp("config-alone")
    MODELS["llama"][1].save_pretrained(made)
    return made


def grpo(folder: Path | str = "unused", **sections: Any) -> GRPOConfig:
    sections = {"sampling": SamplingConfig(max_tokens=32, n=4), **sections}
    return GRPOConfig(model=sections.pop("model", ModelConfig(path=str(folder))), **sections)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_model(name: str) -> None:
    kind, config = MODELS[name]
    model: PreTrainedModel = kind(config)
    found = count(config)
    assert found.parameters == sum(each.numel() for each in model.parameters())
    linears = [each for each in model.model.layers.modules() if isinstance(each, torch.nn.Linear)]
    assert found.matrices == sum(each.weight.numel() for each in linears)
    assert (found.head == 0) == bool(config.tie_word_embeddings)


def test_a_critic_has_a_value_head_in_the_place_of_the_language_models() -> None:
    sizes = count(MODELS["qwen2"][1])
    trunk = sum(each.numel() for each in MODELS["qwen2"][0](MODELS["qwen2"][1]).model.parameters())
    assert sizes.as_critic().parameters == trunk + sizes.hidden + 1


def test_layers_that_no_formula_knows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel whose layers multiply by .*the planner knows dense models"):
        count(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64), "odd")


def test_what_each_rank_of_the_engine_holds(sizes: ModelSizes) -> None:
    alone = engine_shard(sizes, 1)
    assert sum(alone.values()) == sizes.parameters, "512 words are a multiple of 64: nothing is padded"
    halves = engine_shard(sizes, 2)
    assert halves["matrices"] * 2 == alone["matrices"] and halves["rest"] == sizes.norms
    # Two key-value heads on four ranks: each has a whole one.
    of_layers = 2 * sizes.hidden * sizes.key_value * sizes.layers
    assert engine_shard(sizes, 4)["matrices"] == (sizes.matrices - of_layers) // 4 + of_layers // 2
    assert kv_token_bytes(sizes, 4, 2) == kv_token_bytes(sizes, 2, 2) == 2 * 3 * 1 * 32 * 2
    odd = replace(sizes, vocabulary=500)
    assert engine_shard(odd, 2)["embedding"] == 256 * sizes.hidden, "padded to 512"


def test_a_cache_that_holds_no_sequence_says_what_to_change(sizes: ModelSizes) -> None:
    rollout = RolloutConfig(max_model_len=1024, kv_cache_gib=1e-5)
    with pytest.raises(ConfigError, match=r"raise rollout.kv_cache_gib to 0\.01, or lower rollout.max_model_len"):
        kv_cache(grpo(rollout=rollout), sizes, 1, CPU)
    h100 = load_device("h100")[0]
    with pytest.raises(ConfigError, match="raise rollout.gpu_memory_utilization"):
        kv_cache(grpo(rollout=RolloutConfig(gpu_memory_utilization=0.01)), sizes, 1, h100)


def test_sequences_of_a_group_share_their_prompts_blocks() -> None:
    cache = Cache(token_bytes=2, block=16, bytes=2 * 16 * 101)
    assert cache.blocks == 100
    assert cache.sequences(prompt=32, response=16, n=1) == 33
    assert cache.sequences(prompt=32, response=16, n=8) == 80, "2 shared, and one each"


def plan_of(config: GRPOConfig | PPOConfig, device: Device = CPU, ranks: int = 2) -> Plan:
    return make_plan(config, ranks, device, [20] * config.algorithm.prompts_per_step)


def test_what_the_parts_of_memory_are(folder: Path, sizes: ModelSizes) -> None:
    config = grpo(folder, grpo=GRPOHyperparameters(kl_coef=0.1, micro_batch_tokens=4096))
    memory = plan_of(config).memory
    weights = 4 * sizes.parameters
    whole = memory["update"]
    assert (whole["policy"], whole["reference"], whole["gradients"], whole["optimizer"]) == (
        weights, weights, weights, 2 * weights,
    )  # fmt: skip
    assert whole["engine weights"] == 2 * sum(engine_shard(sizes, 2).values())
    assert memory["first generate"]["KV cache"] == memory["loading"]["KV cache"] == GIB and "KV cache" not in whole
    assert 0 < memory["generate"]["KV cache"] < GIB and "optimizer" not in memory["first generate"]
    assert memory["generate"]["kept of the update"] == whole["activations"] + whole["head"]
    assert whole["heap"] == pytest.approx(
        CPU.heap_share * (sum(whole.values()) - whole["heap"] - whole["framework"]), rel=1e-3
    )
    in_parts = plan_of(replace(config, grpo=replace(config.grpo, micro_batch_tokens=256))).memory["update"]
    assert in_parts["gradients"] == 2 * weights and in_parts["activations"] < whole["activations"] / 2


@pytest.mark.parametrize("critic", [True, False])
def test_a_critic_is_trained_too(folder: Path, sizes: ModelSizes, critic: bool) -> None:
    ppo = PPOHyperparameters(critic=str(folder) if critic else None, prompts_per_step=16)
    config = PPOConfig(model=ModelConfig(path=str(folder)), sampling=SamplingConfig(max_tokens=32), ppo=ppo)
    whole = plan_of(config).memory["update"]
    own = sizes.parameters - sizes.head if critic else 0
    assert whole["optimizer"] == 8 * (sizes.parameters + own + sizes.hidden + 1)
    assert whole["critic"] == (4 * (own + sizes.hidden + 1) if critic else 0)


def test_adapters_are_trained_in_place_of_the_policy(folder: Path, sizes: ModelSizes) -> None:
    hyper = GRPOHyperparameters(kl_coef=0.1)
    plan = plan_of(grpo(folder, grpo=hyper, lora=LoraConfig(rank=8), model=ModelConfig(str(folder), dtype="bfloat16")))
    # q and o 128 x 128, k and v 128 x 64, three of the MLP 128 x 352; A and B are as wide as the matrix's two sides.
    trained = 8 * 3 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 352))
    assert plan.models.trained == trained
    whole = plan.memory["update"]
    assert whole["policy"] == 2 * sizes.parameters + 4 * trained and whole["reference"] == 0, "the policy without them"
    assert (whole["gradients"], whole["optimizer"]) == (4 * trained, 8 * trained)
    all_of_it = plan_of(grpo(folder, grpo=hyper))
    assert sum(plan.seconds["optimize"].values()) < sum(all_of_it.seconds["optimize"].values())
    some = LoraConfig(rank=8, target_modules=["v_proj"])
    assert plan_of(grpo(folder, lora=some)).models.trained == 8 * 3 * (128 + 64)


def test_shards_are_held_by_all_ranks_and_gathered_for_every_pass(folder: Path, sizes: ModelSizes) -> None:
    def planned(reduce: str) -> Plan:
        model = ModelConfig(str(folder), sharding="fsdp2", reduce_gradients=reduce)
        hyper = GRPOHyperparameters(kl_coef=0.1, micro_batch_tokens=256)
        return plan_of(grpo(folder, grpo=hyper, model=model, rollout=RolloutConfig(tensor_parallel_size=2)), ranks=8)

    each, once = planned("micro_batch"), planned("update")
    eighth, whole = 4 * sizes.parameters // 8, 4 * sizes.parameters
    for plan, gradients in ((each, eighth), (once, whole)):
        parts = plan.memory["update"]
        assert (parts["policy"], parts["reference"], parts["optimizer"]) == (eighth, eighth, 2 * eighth)
        assert parts["gradients"] == gradients and parts["whole weights"] >= 4 * sizes.embedding
        assert plan.memory["generate"]["gradients"] == 0 and plan.memory["loading"]["policy"] == whole
    assert once.seconds["optimize"]["reduce"] < each.seconds["optimize"]["reduce"]
    assert (
        once.seconds["optimize"]["gather"] == each.seconds["optimize"]["gather"] > 0 < each.seconds["no_grad"]["gather"]
    )


@pytest.mark.parametrize(
    ("sleep", "rests"),
    [("nothing", {"KV cache", "engine weights"}), ("kv_cache", {"engine weights"}), ("all", set())],
)
def test_what_the_engine_gives_back_does_not_stand_beside_an_update(folder: Path, sleep: Any, rests: set[str]) -> None:
    config = grpo(folder, rollout=RolloutConfig(sleep=sleep, max_model_len=256))
    memory = plan_of(config, load_device("h100")[0]).memory
    assert {"KV cache", "engine weights"} & memory["update"].keys() == rests
    assert {"KV cache", "engine weights", "optimizer"} <= memory["generate"].keys() and "loading" not in memory


def test_what_an_environment_says_is_computed_and_not_learned(folder: Path) -> None:
    told = EnvironmentConfig(function="trainers.calculator:calculator")
    config = grpo(folder, environment=told, rollout=RolloutConfig(max_model_len=100))
    plan, alone = plan_of(config), plan_of(replace(config, environment=EnvironmentConfig()))
    assert (plan.observed, alone.observed) == (48, 0), "100 less a prompt of 20 and 32 that are sampled"
    step, before = plan.micro_batch, alone.micro_batch
    assert step.predicting == before.predicting and step.tokens == before.tokens + before.predicting // 32 * 48
    assert plan.seconds["generate"]["prefill"] > alone.seconds["generate"]["prefill"]
    few = make_plan(config, 2, CPU, [20] * 16, observed=5)
    assert few.observed == 5 and few.fitting >= plan.fitting


def test_carried_responses_stand_beside_fresh_ones(folder: Path) -> None:
    assert parts_of(32, 10, max_age=4) == ((0, 10), (10, 10), (20, 10), (30, 2))
    hyper = GRPOHyperparameters(old_logprobs="engine")
    plan = plan_of(grpo(folder, grpo=hyper, partial=PartialConfig(tokens_per_step=8, max_age=4)))
    alone = plan_of(grpo(folder, grpo=hyper))
    assert plan.sequences == 4 * alone.sequences and plan.micro_batch == alone.micro_batch
    decode = [each.seconds["generate"]["decode products"] for each in (plan, alone)]
    assert decode[0] <= decode[1], "a quarter of the steps, four times as many rows"
    assert plan.seconds["generate"]["prefill"] > alone.seconds["generate"]["prefill"], "what they have, again"


GPU_CONFIGS = {file.stem: file for file in Path("configs").glob("*_gpu.yaml")}
QWEN = {  # hidden, MLP, layers, heads, key-value heads, vocabulary, tied: as the models' own config.json
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}


@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_the_configs_for_gpus_fit_as_they_say(name: str, tmp_path: Path) -> None:
    text = GPU_CONFIGS[name].read_text()
    (size,) = set(re.findall(r"Qwen2\.5-(?:Math-)?([\d.]+B)", text))
    d, f, layers, heads, kv_heads, vocabulary, tied = QWEN[size]
    Qwen2Config(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
    ).save_pretrained(tmp_path)  # fmt: skip
    ranks = int(re.findall(r"on (\d) GPUs", text.splitlines()[0])[0])
    words = [str(GPU_CONFIGS[name]), "--gpus", str(ranks), f"model.path={tmp_path}"]
    words += [f"ppo.critic={tmp_path}"] if "critic:" in text else []
    config = config_of(arguments(words))
    plan = make_plan(config, ranks, load_device("h100")[0], [200] * config.algorithm.prompts_per_step)
    assert plan.remedies is None
    if said := re.findall(r"beside the (\d+) GiB of an update", text):
        parts = plan.memory["update"]
        others = ("engine weights", "framework", "heap")
        ours = plan.totals["update"] - sum(parts[other] for other in others)
        assert ours / GIB == pytest.approx(int(said[0]), abs=1)


def test_what_does_not_fit_says_each_change_that_helps(folder: Path) -> None:
    hyper, rollout = GRPOHyperparameters(prompts_per_step=64, micro_batch_tokens=4096), RolloutConfig(kv_cache_gib=0.02)
    config = grpo(folder, grpo=hyper, rollout=rollout)
    plan = plan_of(config)
    assert plan.remedies is None
    tight = replace(CPU, memory_gib=plan.peak / GIB - 0.01)
    told = plan_of(config, tight)
    assert told.remedies is not None and "grpo.micro_batch_tokens=2048" in told.remedies
    assert "model.gradient_checkpointing=true" in told.remedies
    assert "GiB (" in told.advice() and "set grpo.micro_batch_tokens=2048; or set" in told.advice()
    assert "DOES NOT FIT" in text_of(told) and json_of(told, {})["fits"] is False
    smaller = replace(config, grpo=replace(config.grpo, micro_batch_tokens=2048))
    assert plan_of(smaller, tight).remedies is None, "what is proposed does help"
    large_cache = plan_of(replace(config, rollout=RolloutConfig()), replace(CPU, memory_gib=1.9))
    assert large_cache.remedies == ["rollout.kv_cache_gib=0.5"]
    hopeless = plan_of(config, replace(CPU, memory_gib=0.01))
    assert hopeless.remedies == [] and "take a smaller model" in hopeless.advice()
    assert "no setting makes it fit" in text_of(hopeless)
    least = [replace(config.grpo, micro_batch_tokens=256), replace(config.model, gradient_checkpointing=True)]
    both = plan_of(replace(config, grpo=least[0], model=least[1]))
    needed = plan_of(config, replace(CPU, memory_gib=both.peak / GIB + 1e-4)).remedies
    assert needed is not None and len(needed) == 1 and len(needed[0].split()) > 1, "no single one is enough"
    assert all("=" in word for word in needed[0].split())


def test_seconds_follow_the_work(sizes: ModelSizes) -> None:
    batch = rank_batch([20] * 8, 4, 32)
    whole = passes(batch, 10**6, packed=True)
    load = Load([20] * 16, 4, 32, 32, whole, [whole])
    seconds = plan_time(grpo(), Models(sizes), load, tp=2, ranks=2, device=CPU)
    (step,) = whole
    products = 3 * 2 * sizes.matrices * step.tokens / (CPU.bf16_tflops * 1e12)
    assert seconds["optimize"]["products"] == pytest.approx(products)
    assert seconds["optimize"]["head"] == pytest.approx(8 * 512 * 128 * 1024 / (CPU.bf16_tflops * 1e12))
    assert sum(seconds["no_grad"].values()) == 0, "one update, no reference: no pass is needed"
    with_reference = plan_time(grpo(), Models(sizes, reference=True), load, tp=2, ranks=2, device=CPU)
    assert with_reference["no_grad"]["products"] == pytest.approx(products / 3)
    alone = plan_time(grpo(), Models(sizes), load, tp=1, ranks=1, device=CPU)
    assert "all-reduce" not in alone["optimize"] and "all-reduce" not in alone["generate"]
    assert seconds["optimize"]["all-reduce"] == pytest.approx(4 * sizes.parameters / (CPU.all_reduce_gb_per_s * 1e9))


def test_attention_counts_half_of_a_causal_block() -> None:
    assert Pass(10, 4, (Shape(2, 5), Shape(3, 4, 6))).attended == 2 * 25 // 2 + 3 * 4 * 10


def test_a_device_that_runs_by_itself_hides_the_host(sizes: ModelSizes) -> None:
    h100 = load_device("h100")[0]
    load = Load([20] * 16, 4, 32, 32, [], [])
    slow = replace(h100, kv_gb_per_s=1e-3)
    for asynchronous, least in ((True, 0.0), (False, 0.1)):
        config = grpo(rollout=RolloutConfig(async_scheduling=asynchronous))
        assert (generate_seconds(config, sizes, load, 1, slow)["host"] > 0) == (least > 0)
        assert generate_seconds(config, sizes, load, 1, h100)["host"] > 0.1


@pytest.mark.parametrize(("batch", "measured"), [(32, 6968), (64, 10672), (128, 16322), (256, 22642), (512, 24721)])
def test_the_h100_is_calibrated_with_the_table_of_results(batch: int, measured: int) -> None:
    """docs/results.md, On one H100: tokens/s of ours, asynchronous, 128 tokens to prompts of at most 256."""
    random = count(LlamaConfig(**H100_MODEL))
    config = grpo(rollout=RolloutConfig(max_num_seqs=512, max_num_batched_tokens=8192))
    load = Load([100] * batch, 1, 128, batch, [], [])
    seconds = sum(generate_seconds(config, random, load, 1, load_device("h100")[0]).values())
    assert batch * 128 / seconds == pytest.approx(measured, rel=0.2)


def test_the_bottleneck_is_the_largest_part() -> None:
    assert bottleneck({"sync": {"casts": 0.0}, "generate": {"host": 3.0, "prefill": 1.0}}) == ("generate", "host", 0.75)


@pytest.mark.parametrize("name", device_names())
def test_device_files_are_whole(name: str) -> None:
    device, sources = load_device(name)
    assert len(sources) == len(dataclasses.fields(Device)) - 3
    assert all("to be measured" not in source for source in sources.values())
    assert device.predicted == (device.kind == "cuda")


def test_a_device_file_with_a_mistake_says_which() -> None:
    read = yaml.safe_load((FOLDER / "cpu.yaml").read_text())
    for change, told in (
        ({"heap_share": None}, "heap_share is None; it must be {value: a number"),
        ({"heap_share": {"value": -1, "source": "x"}}, "heap_share is .*at least 0"),
        ({"speed": {"value": 1, "source": "x"}}, "has the unknown speed"),
    ):
        with pytest.raises(ConfigError, match=told):
            parse_device(read | {"constants": read["constants"] | change}, "mine.yaml")
    del read["constants"]["bf16_tflops"]
    with pytest.raises(ConfigError, match="mine.yaml lacks bf16_tflops; measure again"):
        parse_device(read, "mine.yaml")
    with pytest.raises(ConfigError, match="--device is nowhere, which cannot be read.*there are a100, cpu, h100"):
        load_device("nowhere")


def test_mistakes_are_found_before_anything_is_read(folder: Path, capsys: pytest.CaptureFixture) -> None:
    model = f"model.path={folder}"
    for words, told in (
        (["configs/ppo_arithmetic.yaml", "--gpus", "8", model], "cannot be split over a tensor_parallel_size of 8"),
        (["configs/ppo_arithmetic.yaml", "--gpus", "2", "rollout.tensor_parallel_size=4"], "does not divide the world"),
        (
            ["configs/ppo_arithmetic.yaml", "--gpus", "2", "--response-tokens", "99", model],
            "above sampling.max_tokens=16",
        ),
        (["configs/ppo_arithmetic.yaml", "--gpus", "2", "--prompt-tokens", "99", model], "leaves 48"),
        ([model, "--gpus", "1"], "no section ppo or grpo; say which it is with --algorithm"),
        (["configs/nothing.yaml", "ppo.steps=1", "--gpus", "1"], "cannot read configs/nothing.yaml"),
    ):
        with pytest.raises(ConfigError, match=told):
            config_of(arguments(words))
    for words, told in (
        (["configs/ppo_arithmetic.yaml"], "--gpus"),
        (["--gpus", "0"], "must be at least 1"),
        (["ppo.steps=1", "--gpus", "1", "--measure", "x.yaml"], "--measure takes no config"),
        (["--gpus", "1", "--json", "no/such/folder/x.json"], "in a folder that does not exist"),
    ):
        with pytest.raises(SystemExit):
            arguments(words)
        assert told in capsys.readouterr().err


def test_prompts_are_as_long_as_said() -> None:
    assert prompt_lengths(grpo(), 30) == [30] * 16
