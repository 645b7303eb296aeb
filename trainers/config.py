"""What one experiment can be told: a dataclass a YAML section, each beside its own checks.

Imports neither torch, vllm nor transformers, so that a mistake in a config is found within a second.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rollout import RolloutConfig, SamplingConfig

ARITHMETIC_OPERATORS = ("+", "-", "*")
MAX_ARITHMETIC_DIGITS = 6


class ConfigError(ValueError):
    """A mistake that the user can mend; trainers.cli shows its message without a traceback and exits with code 1."""


def _check_least(section: str, owner: Any, least: Mapping[str, float]) -> None:
    """Raise where a number of `owner` that is not None lies below its least value (NaN does too)."""
    for name, bound in least.items():
        value = getattr(owner, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"{section}.{name} is {value}; it must be at least {bound}")


def _check_above_zero(section: str, owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{section}.{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class ModelConfig:
    """The policy to train.

    Args:
        path: local folder in Hugging Face format, or a hub name; `make model` makes the default one.
        dtype: the trainer's master weights (the engine's own copy has rollout.dtype).
        autocast: the precision of the trainer's matrix products; no keeps that of `dtype`.
        gradient_checkpointing: true recomputes activations in the backward pass: less memory, slower.
    """

    path: str = "models/smollm2-135m-tp2"
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("model.path is empty; give a local folder or a hub name")


@dataclass(frozen=True)
class DataConfig:
    """The prompts and their answers.

    Args:
        source: arithmetic (problems such as "What is 3+4?", made on the spot), a local .jsonl, .json or .parquet file,
            a local data set folder, or a hub name for datasets.load_dataset.
        split: of a hub data set or folder; a local file has none.
        subset: of a hub data set ("main" or "socratic" of openai/gsm8k); null takes its default.
        prompt_column: holds the question, as text.
        answer_column: holds the answer; of an answer with "####" in it (GSM8K) only what follows the last one counts.
        system_prompt: the system message; null leaves it to the chat template, "" gives an empty one (the shortest
            prompt of the default model). A model without a chat template reads the plain prompt and takes none.
        instruction: text added right after each question, e.g. " Give the number only."
        max_prompt_tokens: limit of a prompt, chat template included; null means all that rollout.max_model_len leaves
            beside sampling.max_tokens.
        overlong: what a prompt over the limit does - error stops the run at its start, drop leaves the prompt out.
        arithmetic_digits: digits of both operands; [1, 2] mixes one-digit and two-digit problems half and half.
        arithmetic_operators: any of "+", "-", "*", mixed in equal parts.
        seed: of the order of the prompts.
        shuffle: true draws a new order for each pass over the data; false keeps the order of the source.

    >>> DataConfig(arithmetic_operators=["/"])
    Traceback (most recent call last):
    ...
    trainers.config.ConfigError: data.arithmetic_operators is ['/']; give one or more of + - *
    """

    source: str = "arithmetic"
    split: str = "train"
    subset: str | None = None
    prompt_column: str = "question"
    answer_column: str = "answer"
    system_prompt: str | None = None
    instruction: str = ""
    max_prompt_tokens: int | None = None
    overlong: Literal["error", "drop"] = "error"
    arithmetic_digits: list[int] = field(default_factory=lambda: [1])
    arithmetic_operators: list[str] = field(default_factory=lambda: ["+"])
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("data.source is empty; give arithmetic, a local file or a hub name")
        _check_least("data", self, {"max_prompt_tokens": 1, "seed": 0})
        digits, operators = self.arithmetic_digits, self.arithmetic_operators
        if not digits or not all(1 <= count <= MAX_ARITHMETIC_DIGITS for count in digits):
            raise ConfigError(f"data.arithmetic_digits is {digits}; give one or more of 1 to {MAX_ARITHMETIC_DIGITS}")
        if not operators or not set(operators) <= set(ARITHMETIC_OPERATORS):
            raise ConfigError(
                f"data.arithmetic_operators is {operators}; give one or more of {' '.join(ARITHMETIC_OPERATORS)}"
            )


@dataclass(frozen=True)
class RewardConfig:
    """How a response is scored: 1 if right, else 0.

    Args:
        name: exact_number (the last number of the response equals the answer) or math_verify (the mathematics of both
            agree: fractions, intervals, expressions).
        require_finish: true gives 0 to a response that sampling.max_tokens or rollout.max_model_len cut.
    """

    name: Literal["exact_number", "math_verify"] = "exact_number"
    require_finish: bool = True


@dataclass(frozen=True)
class PPOHyperparameters:
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347).

    Args:
        steps: rounds of generate, score and update.
        prompts_per_step: prompts of one step, all ranks together; each gets sampling.n responses.
        epochs: passes over the responses of a step.
        minibatches: optimizer updates a pass; the responses are split evenly among them.
        micro_batch_tokens: tokens of one forward and backward pass on this rank, prompts included; changes memory
            and speed, not the result.
        gamma: discount of the return, a token.
        lam: lambda of generalised advantage estimation (arXiv 1506.02438).
        clip_range: how far the policy's ratio may leave 1 before its gradient is cut.
        value_clip_range: how far a value may leave its old one; null switches value clipping off.
        value_coef: weight of the value loss.
        entropy_coef: weight of the entropy bonus; 0 switches it off.
        kl_coef: weight of the KL penalty against the frozen first policy, a token; 0 loads no reference model.
        whiten_advantages: true scales the advantages of a step to mean 0 and variance 1 over all ranks.
    """

    steps: int = 30
    prompts_per_step: int = 128
    epochs: int = 1
    minibatches: int = 2
    micro_batch_tokens: int = 4096
    gamma: float = 1.0
    lam: float = 1.0
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        counts = ("steps", "prompts_per_step", "epochs", "minibatches", "micro_batch_tokens")
        _check_least("ppo", self, dict.fromkeys(counts, 1))
        _check_least("ppo", self, {"value_coef": 0, "entropy_coef": 0, "kl_coef": 0})
        _check_above_zero("ppo", self, "clip_range", "value_clip_range")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"ppo.{name} is {value}; it must be at least 0 and at most 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101).

    Args:
        learning_rate: of the policy, after the warm-up.
        value_learning_rate: of the value head; null takes learning_rate.
        betas: decay of the running means of the gradient and of its square, an update.
        eps: added to the denominator of an update.
        weight_decay: decoupled, as a share of learning_rate.
        max_grad_norm: the gradient is scaled down to this norm.
        warmup_steps: steps (of ppo.steps) over which the learning rate rises linearly from near 0; 0 has no warm-up.
    """

    learning_rate: float = 1e-5
    value_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        least = ("learning_rate", "value_learning_rate", "weight_decay", "warmup_steps")
        _check_least("optimizer", self, dict.fromkeys(least, 0))
        _check_above_zero("optimizer", self, "eps", "max_grad_norm")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {list(self.betas)}; give two numbers, each at least 0 and below 1")


@dataclass(frozen=True)
class RunConfig:
    """Where the run is recorded.

    Args:
        directory: every run gets a folder of its own in here.
        name: of that folder; null names it after the algorithm and the time.
        seed: of the trainer's random streams (rollout.seed and data.seed have their own).
        progress: true draws a progress bar.
        private: true keeps the folder to its owner; false leaves it to the umask.
    """

    directory: str = "runs"
    name: str | None = None
    seed: int = 0
    progress: bool = True
    private: bool = True

    def __post_init__(self) -> None:
        _check_least("run", self, {"seed": 0})
        if self.name is not None and (self.name in ("", ".", "..") or Path(self.name).name != self.name):
            raise ConfigError(f"run.name is {self.name!r}; it must name one folder (set run.directory for the rest)")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases; metrics.jsonl in the run folder has the same numbers in any mode.

    Args:
        mode: auto is online where a login is found and offline elsewhere; disabled writes nothing.
        project: on wandb.
        entity: user or team; null takes the login's own.
        group: joins runs of one experiment, e.g. its seeds.
        tags: of the run.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "torchrun-rollout"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PPOConfig:
    """One PPO experiment.

    Args:
        model: the policy to train
        rollout: the engine that generates (vLLM inside the trainer's processes)
        sampling: how responses are drawn
        data: the prompts and their answers
        reward: how a response is scored
        ppo: the algorithm
        optimizer: AdamW
        run: where the run is recorded
        wandb: Weights & Biases

    Raises:
        ConfigError: if two keys contradict each other, or a number is not finite.

    >>> PPOConfig(rollout=RolloutConfig(max_model_len=64))
    Traceback (most recent call last):
    ...
    trainers.config.ConfigError: sampling.max_tokens is 64 and rollout.max_model_len is 64, which leaves no room for \
a prompt; raise rollout.max_model_len or lower sampling.max_tokens
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOHyperparameters = field(default_factory=PPOHyperparameters)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _check_finite(self)
        if self.max_prompt_tokens < 1:
            raise ConfigError(
                f"sampling.max_tokens is {self.sampling.max_tokens} and rollout.max_model_len is "
                f"{self.rollout.max_model_len}, which leaves no room for a prompt; raise rollout.max_model_len or "
                "lower sampling.max_tokens"
            )
        if (self.data.max_prompt_tokens or 0) > self.max_prompt_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens is {self.data.max_prompt_tokens}, but rollout.max_model_len "
                f"({self.rollout.max_model_len}) less sampling.max_tokens ({self.sampling.max_tokens}) leaves "
                f"{self.max_prompt_tokens}; raise rollout.max_model_len or lower data.max_prompt_tokens"
            )
        if self.sampling.temperature == 0:
            raise ConfigError("sampling.temperature is 0 (greedy); PPO learns from sampled responses: set it above 0")

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that a full-length response leaves to the prompt within rollout.max_model_len."""
        return self.rollout.max_model_len - self.sampling.max_tokens


def _check_finite(config: Any) -> None:
    for section in fields(config):
        for key in fields(getattr(config, section.name)):
            value = getattr(getattr(config, section.name), key.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{section.name}.{key.name} is {value}; it must be a finite number")


def check_world(config: PPOConfig, world_size: int) -> None:
    """Check the keys that depend on how many ranks torchrun started.

    Raises:
        ConfigError: if tensor_parallel_size does not divide the world, or a step's prompts do not split evenly over
            the ranks, or a rank has fewer responses than minibatches.

    >>> check_world(PPOConfig(rollout=RolloutConfig(tensor_parallel_size=2)), world_size=1)
    Traceback (most recent call last):
    ...
    trainers.config.ConfigError: rollout.tensor_parallel_size is 2, which does not divide the world size of 1; start \
the script with torchrun --nproc_per_node=2 (or a multiple), or set rollout.tensor_parallel_size=1
    """
    size = config.rollout.tensor_parallel_size
    if size is not None and world_size % size:
        raise ConfigError(
            f"rollout.tensor_parallel_size is {size}, which does not divide the world size of {world_size}; start the "
            f"script with torchrun --nproc_per_node={size} (or a multiple), or set rollout.tensor_parallel_size=1"
        )
    prompts = config.ppo.prompts_per_step
    if prompts % world_size:
        raise ConfigError(
            f"ppo.prompts_per_step is {prompts}, which {world_size} ranks cannot share evenly; set a multiple of "
            f"{world_size}, e.g. ppo.prompts_per_step={math.ceil(prompts / world_size) * world_size}"
        )
    responses = prompts // world_size * config.sampling.n
    if config.ppo.minibatches > responses:
        raise ConfigError(
            f"ppo.minibatches is {config.ppo.minibatches}, but each of {world_size} ranks has only {responses} "
            "responses a step; lower ppo.minibatches or raise ppo.prompts_per_step"
        )


def is_local(path: str) -> bool:
    """Whether a model path means a folder of this machine rather than a hub name.

    >>> is_local("models/mine"), is_local("./mine"), is_local("some-org/some-model")
    (True, True, False)
    """
    return path.startswith((".", "/", "~", "models/")) or Path(path).exists()


def check_model(config: PPOConfig, world_size: int = 1) -> None:
    """Check a local model's folder and config.json; a hub name passes unread.

    vLLM gives each of `tp` ranks attention_heads / tp heads, and kv_heads / tp key-value heads or, where there are
    more ranks than key-value heads, a copy of one: then kv_heads has to divide tp.

    Args:
        world_size: ranks of the job, taken for `tp` where rollout.tensor_parallel_size is None.

    Raises:
        ConfigError: if the folder or its config.json is missing, if tensor parallelism does not divide its heads, or
            if rollout.max_model_len exceeds the model's positions.
    """
    if not is_local(config.model.path):
        return
    model = _read_model_config(config.model.path)
    model = model.get("text_config", model)  # multimodal models nest the language model's numbers
    tp = config.rollout.tensor_parallel_size or world_size
    heads = model.get("num_attention_heads")
    kv_heads = model.get("num_key_value_heads") or heads
    if heads is not None and (heads % tp or (kv_heads % tp and tp % kv_heads)):
        raise ConfigError(
            f"model.path is {config.model.path!r}: its {heads} attention heads and {kv_heads} key-value heads cannot "
            f"be split over a tensor_parallel_size of {tp}. Pad them with `python scripts/prepare_model.py "
            f"--tensor-parallel-size {tp} --source {config.model.path} --output FOLDER` and set model.path=FOLDER, or "
            "set rollout.tensor_parallel_size=1"
        )
    positions = model.get("max_position_embeddings")
    if positions is not None and config.rollout.max_model_len > positions:
        raise ConfigError(
            f"rollout.max_model_len is {config.rollout.max_model_len}, but the model at {config.model.path!r} has "
            f"max_position_embeddings={positions}; lower rollout.max_model_len"
        )


def _read_model_config(path: str) -> dict[str, Any]:
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        what = "has no config.json" if file.parent.is_dir() else "is not a folder"
        raise ConfigError(
            f"model.path is {path!r}, which {what} (seen from {Path.cwd()}); make the default model with `make model` "
            "or `python scripts/prepare_model.py`, or give another local folder or a hub name"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
