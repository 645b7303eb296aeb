"""Bad input is refused before anything is loaded, in one message that names the key; good input means what it says."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rollout import RolloutConfig, SamplingConfig
from tests.tiny_tokenizer import tiny_tokenizer
from trainers.checks import check_model, check_world
from trainers.cli import dump, parse, run_cli
from trainers.config import (
    CheckpointConfig,
    DataConfig,
    GRPOConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RunConfig,
    WandbConfig,
)
from trainers.errors import ConfigError
from trainers.help import help_text
from trainers.hyperparameters import GRPOHyperparameters, PPOHyperparameters

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(PPOConfig, list(argv))
    return str(error.value)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


# --- ranges and contradictions


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (ModelConfig, "path", ""),
        (DataConfig, "source", ""),
        (DataConfig, "max_prompt_tokens", 0),
        (DataConfig, "seed", -1),
        (DataConfig, "arithmetic_digits", []),
        (DataConfig, "arithmetic_digits", [1, 0]),
        (DataConfig, "arithmetic_digits", [7]),
        (DataConfig, "arithmetic_operators", []),
        (DataConfig, "arithmetic_operators", ["+", "/"]),
        (PPOHyperparameters, "steps", 0),
        (PPOHyperparameters, "prompts_per_step", 0),
        (PPOHyperparameters, "epochs", 0),
        (PPOHyperparameters, "minibatches", 0),
        (PPOHyperparameters, "micro_batch_tokens", 0),
        (PPOHyperparameters, "gamma", 1.01),
        (PPOHyperparameters, "lam", -0.01),
        (PPOHyperparameters, "lam", float("nan")),
        (PPOHyperparameters, "clip_range", 0.0),
        (PPOHyperparameters, "clip_range", float("nan")),
        (PPOHyperparameters, "value_clip_range", 0.0),
        (PPOHyperparameters, "value_coef", -0.1),
        (PPOHyperparameters, "entropy_coef", -0.1),
        (PPOHyperparameters, "kl_coef", -0.1),
        (OptimizerConfig, "learning_rate", -1e-5),
        (OptimizerConfig, "learning_rate", float("nan")),
        (OptimizerConfig, "value_learning_rate", -1e-5),
        (OptimizerConfig, "betas", (0.9, 1.0)),
        (OptimizerConfig, "eps", 0.0),
        (OptimizerConfig, "weight_decay", -0.1),
        (OptimizerConfig, "max_grad_norm", 0.0),
        (OptimizerConfig, "warmup_steps", -1),
        (CheckpointConfig, "every", 0),
        (CheckpointConfig, "keep", 0),
        (CheckpointConfig, "resume", ""),
        (CheckpointConfig, "resume", "auto"),  # without checkpoint.every
        (RunConfig, "seed", -1),
        (RunConfig, "name", ""),
        (RunConfig, "name", "a/b"),
        (RunConfig, "name", ".."),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_dotted_key(section, key, value):
    names = {hint: name for name, hint in typing.get_type_hints(PPOConfig).items()}
    with pytest.raises(ConfigError, match=rf"^{names[section]}\.{key} is "):
        section(**{key: value})


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        # 64 - 64 = 0 tokens are left to a prompt; with max_tokens=63 it is one.
        (
            {"rollout": RolloutConfig(max_model_len=64), "sampling": SamplingConfig(max_tokens=64)},
            "sampling.max_tokens",
        ),
        # 1024 - 64 = 960
        ({"data": DataConfig(max_prompt_tokens=961)}, "data.max_prompt_tokens"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "sampling.temperature"),
        ({"optimizer": OptimizerConfig(learning_rate=float("inf"))}, "optimizer.learning_rate"),
        ({"rollout": RolloutConfig(kv_cache_gib=float("nan"))}, "rollout.kv_cache_gib"),
        ({"checkpoint": CheckpointConfig(every=1, resume="auto")}, "checkpoint.resume"),
        ({"model": ModelConfig(dtype="bfloat16")}, "model.dtype"),
        (
            {
                "model": ModelConfig(dtype="bfloat16"),
                "lora": LoraConfig(rank=8),
                "ppo": PPOHyperparameters(critic="a/model"),
            },
            "model.dtype",
        ),
        ({"sampling": SamplingConfig(top_p=0.9), "ppo": PPOHyperparameters(mismatch="truncate")}, "sampling.top_p"),
        ({"sampling": SamplingConfig(top_k=5), "ppo": PPOHyperparameters(old_logprobs="engine")}, "sampling.top_k"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(sections, key):
    with pytest.raises(ConfigError, match=f"^{key} is "):
        PPOConfig(**sections)


def test_adapters_may_stand_on_half_precision_and_a_cut_distribution_may_be_learned_from():
    PPOConfig(model=ModelConfig(dtype="bfloat16"), lora=LoraConfig(rank=8))
    PPOConfig(sampling=SamplingConfig(top_p=0.9, top_k=5, min_p=0.1))


def test_a_home_in_a_path_is_put_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "mine.yaml"
    file.write_text("data: {source: ~/data.jsonl}\nevaluation: {source: ~/other.jsonl}\n")
    words = ["model.path=~/m", "run.directory=~/runs", "ppo.critic=~/c", "checkpoint.resume=~/runs/x"]
    config, _ = parse(PPOConfig, [str(file), *words])
    paths = (config.model.path, config.run.directory, config.ppo.critic, config.checkpoint.resume, config.data.source)
    assert paths == tuple(f"/home/me/{name}" for name in ("m", "runs", "c", "runs/x", "data.jsonl"))
    assert config.evaluation.source == "/home/me/other.jsonl" and config.evaluation.split is None


def test_the_prompt_limit_is_what_a_full_response_leaves():
    config = PPOConfig(
        rollout=RolloutConfig(max_model_len=64),
        sampling=SamplingConfig(max_tokens=63),
        data=DataConfig(max_prompt_tokens=1),
    )
    assert config.max_prompt_tokens == 1
    assert PPOConfig(data=DataConfig(max_prompt_tokens=960)).max_prompt_tokens == 960


def ppo_config(tp: int | None = None, prompts: int = 8, minibatches: int = 2, n: int = 1) -> PPOConfig:
    return PPOConfig(
        rollout=RolloutConfig(tensor_parallel_size=tp),
        sampling=SamplingConfig(n=n),
        ppo=PPOHyperparameters(prompts_per_step=prompts, minibatches=minibatches),
    )


@pytest.mark.parametrize(
    ("config", "world_size", "key"),
    [
        (ppo_config(tp=2), 3, "rollout.tensor_parallel_size is 2"),
        (ppo_config(tp=4), 2, "rollout.tensor_parallel_size is 4"),
        (ppo_config(prompts=9), 2, r"ppo.prompts_per_step is 9.*ppo.prompts_per_step=10"),
        # 8 prompts / 4 ranks = 2 responses a rank, 3 minibatches
        (ppo_config(minibatches=3), 4, "ppo.minibatches is 3.* only 2 "),
    ],
)
def test_a_world_that_does_not_divide_is_refused(config, world_size, key):
    with pytest.raises(ConfigError, match=key):
        check_world(config, world_size)


def test_worlds_that_divide_pass():
    check_world(ppo_config(tp=2), 2)
    check_world(ppo_config(tp=2), 4)
    check_world(ppo_config(tp=None), 8 // 4)
    check_world(ppo_config(minibatches=3, n=2), 4)  # 8 / 4 * 2 = 4 responses a rank


# --- the model's folder


def model_folder(tmp_path: Path, **numbers) -> str:
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "fits"),
    [
        (9, 3, 1, True),
        (9, 3, 2, False),  # SmolLM2-135M as it comes
        (9, 3, 3, True),
        (12, 4, 2, True),  # padded
        (12, 4, 3, False),  # 12 / 3 heads, but 4 key-value heads over 3 ranks
        (16, 2, 4, True),  # each key-value head stands on 4 / 2 ranks
        (16, 6, 8, False),  # 8 / 6 does not
        (8, None, 4, True),  # no grouped queries: as many key-value heads as heads
        (8, None, 3, False),
    ],
)
def test_tensor_parallelism_has_to_divide_the_heads(tmp_path, heads, kv_heads, tp, fits):
    path = model_folder(tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads)
    config = PPOConfig(model=ModelConfig(path=path), rollout=RolloutConfig(tensor_parallel_size=tp))
    if fits:
        check_model(config)
    else:
        with pytest.raises(ConfigError, match=rf"python scripts/prepare_model.py --tensor-parallel-size {tp}"):
            check_model(config)


def test_without_a_size_all_ranks_share_the_heads(tmp_path):
    config = PPOConfig(model=ModelConfig(path=model_folder(tmp_path, num_attention_heads=9, num_key_value_heads=3)))
    check_model(config, world_size=3)
    with pytest.raises(ConfigError, match="tensor_parallel_size of 2"):
        check_model(config, world_size=2)


def test_a_nested_language_model_is_read(tmp_path):
    path = model_folder(tmp_path, text_config={"num_attention_heads": 9, "num_key_value_heads": 3})
    with pytest.raises(ConfigError, match="9 attention heads"):
        check_model(PPOConfig(model=ModelConfig(path=path)), world_size=2)


def test_a_sequence_longer_than_the_models_positions_is_refused(tmp_path):
    config = PPOConfig(model=ModelConfig(path=model_folder(tmp_path, max_position_embeddings=1023)))
    with pytest.raises(ConfigError, match=r"rollout.max_model_len is 1024.*max_position_embeddings=1023"):
        check_model(config)


@pytest.mark.parametrize("path", ["models/none-such", "./none-such", "/none-such"])
def test_a_missing_local_model_names_the_command_that_makes_one(path):
    with pytest.raises(ConfigError, match=r"make model.*python scripts/prepare_model.py"):
        check_model(PPOConfig(model=ModelConfig(path=path)))


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    config = PPOConfig(model=ModelConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has no config.json"):
        check_model(config)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        check_model(config)


def test_a_hub_name_is_left_to_the_hub():
    check_model(PPOConfig(model=ModelConfig(path="some-org/some-model")), world_size=7)


# --- the command line


def test_overrides_win_over_the_file_which_wins_over_the_defaults(tmp_path):
    path = write(tmp_path, "rollout: {max_num_seqs: 5, seed: 6}\noptimizer:\n  learning_rate: 3e-5\n")
    config, dry_run = parse(PPOConfig, ["rollout.seed=8", path, "--rollout.seed=9", "--dry-run"])
    assert (config.rollout.max_num_seqs, config.rollout.seed, config.optimizer.learning_rate) == (5, 9, 3e-5)
    assert config.rollout.max_model_len == RolloutConfig().max_model_len
    assert dry_run
    assert parse(PPOConfig, []) == (PPOConfig(), False)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.path=3", "3"),
        ("sampling.temperature=1", 1.0),
        ("sampling.stop_token_ids=[1, 2]", [1, 2]),
        ("rollout.tensor_parallel_size=null", None),
        ("rollout.async_scheduling=false", False),
        ("ppo.value_clip_range=null", None),
        ("optimizer.betas=[0.5, 0.75]", (0.5, 0.75)),
        ("data.system_prompt=", ""),
        ("data.system_prompt=null", None),
        ("data.system_prompt=# You: add, [carefully]", "# You: add, [carefully]"),
        ("data.instruction= a=b", " a=b"),
        ('data.arithmetic_operators=["+", "*"]', ["+", "*"]),
        ("wandb.tags=[a, b]", ["a", "b"]),
    ],
)
def test_an_override_has_the_value_that_it_shows(override, value):
    config, _ = parse(PPOConfig, [override])
    section, key = override.partition("=")[0].split(".")
    got = getattr(getattr(config, section), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("rollout.max_num_seq=3", ["rollout.max_num_seq (", "did you mean rollout.max_num_seqs?"]),
        ("--rollout.max_num_seq=3", ["did you mean rollout.max_num_seqs?"]),
        ("rolout.seed=3", ["did you mean rollout.seed?"]),
        ("max_num_seqs=3", ["did you mean rollout.max_num_seqs?"]),
        ("max_token=3", ["did you mean sampling.max_tokens?"]),
        ("rollout.learning_rate=3", ["did you mean optimizer.learning_rate?"]),
        ("seed=3", ["did you mean rollout.seed or data.seed or run.seed?"]),
        ("rollot.x=3", ["rollot.x (", "not a key"]),
        ("optimizer.lr=3", ["optimizer.learning_rate, optimizer.value_learning_rate"]),
        ("rollout=3", ["rollout (on the command line) is not a key but a section", "rollout.max_num_seqs"]),
        ("rollout.seed", ["no value", "rollout.seed=VALUE"]),
        ("rollout", ["neither a YAML file nor section.key=value"]),
        ("none-such.yaml", ["cannot read none-such.yaml"]),
        ("rollout.max_num_seqs=x", ["rollout.max_num_seqs (on the command line) is x; it must be a whole number"]),
        ("rollout.max_num_seqs=3.0", ["is 3.0; it must be a whole number"]),
        ("rollout.max_num_seqs=true", ["is true; it must be a whole number"]),
        ("rollout.async_scheduling=1", ["is 1; it must be true or false"]),
        ("rollout.kv_cache_gib=much", ["is much; it must be a number or null"]),
        ("rollout.dtype=fp8", ["is fp8; it must be bfloat16 or float16 or float32"]),
        ("wandb.tags=a", ['is a; it must be a list of texts, as ["a", "b"]']),
        ("optimizer.betas=[0.9]", ["it must be a list of 2 numbers"]),
        ("rollout.max_num_seqs=0", ["rollout.max_num_seqs is 0; it must be at least 1"]),
        ("ppo.steps=0", ["ppo.steps is 0; it must be at least 1"]),
    ],
)
def test_a_wrong_word_is_refused_by_a_message_that_helps(word, parts):
    message = refused(word)
    for part in parts:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "rollout:\n  seed: 1\n  max_num_seq: 3\n",
            ["rollout.max_num_seq (", "line 3", "did you mean rollout.max_num_seqs?"],
        ),
        ("rollot:\n  seed: 1\n", ["rollot (", "line 1", "did you mean rollout?"]),
        ("rollout:\n  seed: x\n", ["rollout.seed (", "line 2) is x; it must be a whole number"]),
        ("rollout:\n  seed: [1, 2]\n", ["is [1, 2]; it must be a whole number"]),
        ("data:\n  instruction: 1e-5\n", ['it must be a text; put it in quotes: "1e-5"']),
        ("rollout:\n  seed: 1\n  seed: 2\n", ["rollout.seed (", "line 3", "stands twice"]),
        ("rollout:\n  seed: 1\nrollout:\n  dtype: float32\n", ["rollout (", "line 3", "stands twice"]),
        ("rollout: 3\n", ["rollout is a section (", "line 1"]),
        ("rollout:\n", ["rollout is a section ("]),
        ("- rollout\n", ["holds sections ("]),
        ("a: b: c\n", ["not valid YAML"]),
        ("model:\n  path: !!python/object/apply:os.getcwd []\n", ["cannot be read"]),
        ("rollout:\n  class_path: os.system\n", ["rollout.class_path ("]),
        ("sampling:\n  max_tokens: 2048\n", ["sampling.max_tokens is 2048 and rollout.max_model_len is 1024"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text, parts):
    message = refused(write(tmp_path, text))
    for part in parts:
        assert part in message


def test_a_wrong_value_in_the_file_is_blamed_on_the_file_even_where_it_is_overridden(tmp_path):
    assert "line 2) is x;" in refused(write(tmp_path, "rollout:\n  seed: x\n"), "rollout.seed=3")


def test_text_of_the_file_stays_text_beside_an_override(tmp_path):
    path = write(tmp_path, 'data:\n  system_prompt: "# Role"\nrun:\n  name: "null"\n')
    config, _ = parse(PPOConfig, [path, "rollout.seed=3"])
    assert (config.data.system_prompt, config.run.name) == ("# Role", "null")


def test_an_empty_file_changes_nothing_and_two_files_are_refused(tmp_path):
    path = write(tmp_path, "# nothing\n")
    assert parse(PPOConfig, [path])[0] == PPOConfig()
    assert "got 2 YAML files" in refused(path, path)


def test_yaml_tags_run_no_code(tmp_path):
    bait = tmp_path / "bait"
    refused(write(tmp_path, f"model:\n  path: !!python/object/apply:os.mkdir ['{bait}']\n"))
    assert not bait.exists()


odd_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(
        ["null", "~", "1e-5", "3", "true", "# no comment", "a: b", "[x]", "", " ", "\n", "'", '"', "{", "!x"]
    ),
)


@settings(max_examples=40, deadline=None)
@example("1e-5", "1e-5", ["1e-5"], 1e-5, None, (0.0, 0.9), [1])
@example("null", "null", ["null"], 1e-5, 1e9, (0.0, 0.9), [1])
@given(
    system_prompt=st.none() | odd_text,
    instruction=odd_text,
    tags=st.lists(odd_text, max_size=3),
    learning_rate=st.floats(0, 1),
    value_clip_range=st.none() | st.floats(1e-9, 1e9),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    digits=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_a_dumped_config_reads_back_the_same(
    tmp_path_factory, system_prompt, instruction, tags, learning_rate, value_clip_range, betas, digits
):
    config = PPOConfig(
        data=DataConfig(system_prompt=system_prompt, instruction=instruction, arithmetic_digits=digits),
        ppo=PPOHyperparameters(value_clip_range=value_clip_range),
        optimizer=OptimizerConfig(learning_rate=learning_rate, betas=betas),
        wandb=WandbConfig(tags=tags),
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert parse(PPOConfig, [str(path)])[0] == config


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(PPOConfig, ["--help", "unknown=3"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text == help_text(PPOConfig)
    lines = text.splitlines()
    for section, section_class in typing.get_type_hints(PPOConfig).items():
        assert any(line.startswith(f"{section}: ") and len(line) > len(section) + 5 for line in lines)
        for key in typing.get_type_hints(section_class):
            assert any(line.startswith(f"  {section}.{key}=") for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_keeps_to_the_width_of_the_terminal(width):
    lines = help_text(PPOConfig, width=width).splitlines()
    assert width - 12 < max(map(len, lines)) <= width
    only = help_text(PPOConfig, ["ppo.gamma"], width).splitlines()
    assert only[0] == "ppo: the algorithm" and only[1].startswith("  ppo.gamma=1.0  (") and len(only) == 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_each_config_of_the_repository_is_sound_and_says_only_what_differs(path):
    source = path.read_text()
    experiment = GRPOConfig if "\ngrpo:" in source else PPOConfig
    config, _ = parse(experiment, [str(path)])
    on_gpus = re.search(r" on (\d) GPUs", source)
    for world_size in [int(on_gpus[1])] if on_gpus else [1, 2]:
        check_world(config, world_size)
    for section, keys in yaml.safe_load(source).items():
        for key in keys:
            default = getattr(getattr(experiment(), section), key)
            assert getattr(getattr(config, section), key) != default or key == "max_model_len", f"{section}.{key}"
    assert source.startswith("# ") and not source.split("\n")[1].startswith("#")


def test_the_defaults_of_an_experiment_go_before_those_of_its_sections(capsys):
    assert parse(GRPOConfig, []) == (GRPOConfig(), False)
    assert GRPOConfig().sampling.n == 8 and parse(GRPOConfig, ["sampling.max_tokens=5"])[0].sampling.n == 8
    with pytest.raises(SystemExit):
        parse(GRPOConfig, ["--help"])
    text = capsys.readouterr().out
    assert "  sampling.n=8  " in text and "  grpo.clip_range_high=null  " in text and "  grpo.kl_in=loss  " in text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"kl_coef": 0.1, "kl_in": "loss", "kl_estimator": "k1"}, "grpo.kl_estimator=k2 or k3"),
        ({"kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k3"}, "grpo.kl_estimator=k1, or grpo.kl_in=loss"),
        ({"mismatch": "mask", "old_logprobs": "engine"}, "correct for the same disagreement twice"),
        ({"mismatch_bounds": (1.5, 2.0)}, r"grpo.mismatch_bounds is \[1.5, 2.0\]"),
        ({"dual_clip": 1.0}, "grpo.dual_clip is 1.0; it must be above 1"),
    ],
)
def test_hyperparameters_that_contradict_each_other(keys, words):
    with pytest.raises(ConfigError, match=words):
        GRPOHyperparameters(**keys)


# --- the script


def test_a_config_error_needs_neither_torch_nor_vllm():
    script = (
        "import sys, trainers.config, trainers.cli\n"
        "assert not {'torch', 'vllm', 'transformers', 'datasets', 'wandb'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=60)


def sound_model(tmp_path: Path, max_position_embeddings: int = 2048) -> str:
    tiny_tokenizer().save_pretrained(tmp_path)
    numbers = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    numbers["max_position_embeddings"] = max_position_embeddings
    return model_folder(tmp_path, model_type="llama", **numbers)


def must_not_run(config):
    raise AssertionError("main was called")


def test_a_dry_run_prints_the_resolved_config_and_trains_nothing(tmp_path, capsys):
    argv = [f"model.path={sound_model(tmp_path)}", "rollout.seed=3", "--dry-run"]
    run_cli(PPOConfig, must_not_run, argv)
    out, err = capsys.readouterr()
    assert parse(PPOConfig, [write(tmp_path, out)])[0] == parse(PPOConfig, argv)[0]
    assert "100 prompts to train on and 0 to evaluate on, of at most " in err


@pytest.mark.parametrize("path", [path for path in CONFIGS if "gpu" in path.name], ids=lambda path: path.name)
def test_each_config_for_gpus_passes_a_dry_run(path, tmp_path, monkeypatch, capsys):
    """On the ranks that it is for, with a model and data of this machine in place of the hub's."""
    source = path.read_text()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "2+2", "problem": "2+2", "answer": "4"}\n')
    here = [f"model.path={sound_model(tmp_path, max_position_embeddings=4096)}", f"data.source={rows}"]
    here += [f"evaluation.source={rows}", "evaluation.split=null", "data.subset=null"]
    here += ["rollout.max_model_len=3072"]  # a token a byte
    (ranks,) = re.findall(r" on (\d) GPUs", source)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    run_cli(GRPOConfig if "\ngrpo:" in source else PPOConfig, must_not_run, [str(path), *here, "--dry-run"])
    assert "The config is sound: 1 prompts to train on and 1 to evaluate on" in capsys.readouterr().err


def test_a_dry_run_reads_the_data(tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"problem": "2+2", "answer": "4"}\n')
    with pytest.raises(SystemExit) as stop:
        run_cli(PPOConfig, must_not_run, [f"model.path={sound_model(tmp_path)}", f"data.source={source}", "--dry-run"])
    assert stop.value.code == 1
    assert "data.prompt_column is 'question'" in capsys.readouterr().err


def test_main_gets_the_config_and_its_own_config_errors_exit_with_1(tmp_path, capsys):
    seen = []

    def main(config):
        seen.append(config)
        raise ConfigError("row 3 is too long")

    with pytest.raises(SystemExit) as stop:
        run_cli(PPOConfig, main, [f"model.path={sound_model(tmp_path)}", "ppo.steps=7"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: row 3 is too long\n"
    assert [config.ppo.steps for config in seen] == [7]


@pytest.mark.parametrize(
    ("argv", "world_size", "part"),
    [
        (["ppo.stepps=1"], "1", "did you mean ppo.steps?"),
        (["model.path=./none-such"], "1", "make model"),
        (["rollout.tensor_parallel_size=2"], "1", "torchrun --nproc_per_node=2"),
        (["ppo.prompts_per_step=3"], "2", "ppo.prompts_per_step is 3"),
    ],
)
def test_bad_input_exits_with_1_before_main(tmp_path, monkeypatch, capsys, argv, world_size, part):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(SystemExit) as stop:
        run_cli(PPOConfig, must_not_run, [f"model.path={sound_model(tmp_path)}", *argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert out == "" and err.startswith("error: ") and part in err


def test_the_first_rank_speaks_while_the_others_wait():
    script = (
        "from trainers.cli import run_cli; from trainers.config import PPOConfig; run_cli(PPOConfig, print, ['x=1'])"
    )

    def start(rank: int) -> subprocess.Popen:
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        return subprocess.Popen(
            [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
        )

    second = start(1)
    first = start(0)
    try:
        _, message = first.communicate(timeout=30)
        assert first.returncode == 1 and message.startswith("error: x (")
        time.sleep(0.5)
        assert second.poll() is None  # torchrun would end it now
    finally:
        second.terminate()
        _, message = second.communicate(timeout=30)
    assert message == ""


def test_every_section_is_frozen():
    for section in dataclasses.fields(PPOConfig):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(getattr(PPOConfig(), section.name), "seed", 1)  # noqa: B010
