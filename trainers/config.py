"""What one experiment can be told: a dataclass a YAML section, each beside its own checks.

Imports neither torch, vllm nor transformers, so that a mistake in a config is found within a second.
"""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rollout import RolloutConfig, SamplingConfig
from trainers.errors import ConfigError, check_above_zero, check_least
from trainers.hyperparameters import GRPOHyperparameters, Hyperparameters, PPOHyperparameters

ARITHMETIC_OPERATORS = ("+", "-", "*")
MAX_ARITHMETIC_DIGITS = 6
BUILT_IN_REWARDS = ("exact_number", "math_verify")
FUNCTION_PATH = r".+:[A-Za-z_][A-Za-z0-9_]*"
"""Of a function of the user's: module:function, or file.py:function."""


@dataclass(frozen=True)
class ModelConfig:
    """The policy to train.

    Args:
        path: local folder in Hugging Face format, or a hub name; `make model` makes the default one.
        dtype: the trainer's master weights (the engine's own copy has rollout.dtype); bfloat16 for weights that are not
            trained alone (lora.rank), since it rounds an update of a usual learning rate away.
        autocast: the precision of the trainer's matrix products; no keeps that of `dtype`.
        gradient_checkpointing: true recomputes activations in the backward pass: less memory, slower.
        sharding: of the trainer's weights, gradients and optimizer state, over all ranks - ddp (every rank has all of
            them: 16 bytes a weight with dtype=float32) or fsdp2 (each its share of them: for models that do not fit).
        reduce_gradients: under fsdp2, when gradients travel - micro_batch (with each one) or update (with the last
            one: faster, and takes 4 bytes more a weight on every rank). ddp does it once an update.
    """

    path: str = "models/smollm2-135m-tp2"
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    reduce_gradients: Literal["micro_batch", "update"] = "micro_batch"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("model.path is empty; give a local folder or a hub name")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank, trained in place of the policy's own matrices (LoRA, arXiv 2106.09685).

    A value head on the policy's trunk trains through the adapters; a critic of its own (ppo.critic) is trained whole.

    Args:
        rank: of the adapters; null has none and trains the whole policy.
        alpha: a matrix W counts as W + alpha / rank * B @ A.
        dropout: share of an adapter's inputs that the passes with gradient drop. Those without drop none, and are then
            always made, so that the ratio starts from the policy that the engine sampled from; it is not 1 at first.
        target_modules: the layers that get adapters, by the ends of their names, e.g. ["q_proj", "v_proj"]; [] takes
            all linear layers but the head.

    >>> LoraConfig(dropout=0.1)
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: lora.dropout is 0.1, but lora.rank is null, which trains the whole policy without \
adapters; set lora.rank=16, say
    """

    rank: int | None = None
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_least("lora", self, {"rank": 1})
        check_above_zero("lora", self, "alpha")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        if not all(self.target_modules):
            raise ConfigError("lora.target_modules has an empty name; give ends of layers' names, or []")
        for name, default in {"dropout": 0.0, "target_modules": []}.items():
            if self.rank is None and getattr(self, name) != default:
                raise ConfigError(
                    f"lora.{name} is {getattr(self, name)}, but lora.rank is null, which trains the whole policy "
                    "without adapters; set lora.rank=16, say"
                )


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
    trainers.errors.ConfigError: data.arithmetic_operators is ['/']; give one or more of + - *
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
        check_least("data", self, {"max_prompt_tokens": 1, "seed": 0})
        digits, operators = self.arithmetic_digits, self.arithmetic_operators
        if not digits or not all(1 <= count <= MAX_ARITHMETIC_DIGITS for count in digits):
            raise ConfigError(f"data.arithmetic_digits is {digits}; give one or more of 1 to {MAX_ARITHMETIC_DIGITS}")
        if not operators or not set(operators) <= set(ARITHMETIC_OPERATORS):
            raise ConfigError(
                f"data.arithmetic_operators is {operators}; give one or more of {' '.join(ARITHMETIC_OPERATORS)}"
            )


@dataclass(frozen=True)
class RewardConfig:
    """How a response is scored.

    Args:
        name: exact_number (1 if the last number of the response equals the answer, else 0) or math_verify (1 if the
            mathematics of both agree: fractions, intervals, expressions).
        require_finish: true gives 0 to a response that sampling.max_tokens or rollout.max_model_len cut.
        functions: of your own, in place of `name`, as "module:function" or "path/to/file.py:function"; exact_number
            and math_verify may stand among them. Each is called as function(response, answer, sample) and returns a
            number (trainers/reward_functions.py).
        weights: of the functions, in their order; the score is the weighted sum. [] takes 1 for each.
        workers: processes a rank that score, so that a slow or failing function is bounded; 0 scores in the rank
            itself, where nothing bounds it (math_verify has a limit of its own).
        timeout_s: of one response in a worker, all functions together; the worker is then ended and replaced.
        on_error: what happens where a function raises, gives no finite number or runs out of time - raise ends the
            run, zero gives the response 0 and counts it in reward/failed.

    >>> RewardConfig(functions=["mine.py:short"], weights=[1.0, 2.0])
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: reward.weights has 2 numbers for 1 of reward.functions; give one each, or []
    """

    name: Literal["exact_number", "math_verify"] = "exact_number"
    require_finish: bool = True
    functions: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    workers: int = 0
    timeout_s: float = 20.0
    on_error: Literal["raise", "zero"] = "raise"

    @property
    def paths(self) -> list[str]:
        """Of all functions: `functions`, else `name`."""
        return self.functions or [self.name]

    @property
    def names(self) -> list[str]:
        """What each is called in the metrics: the function's own name."""
        return [path.rpartition(":")[2] for path in self.paths]

    def __post_init__(self) -> None:
        check_least("reward", self, {"workers": 0})
        check_above_zero("reward", self, "timeout_s")
        for path in self.functions:
            if path not in BUILT_IN_REWARDS and not re.fullmatch(FUNCTION_PATH, path):
                raise ConfigError(
                    f"reward.functions has {path!r}; give module:function, path/to/file.py:function, or one of "
                    f"{', '.join(BUILT_IN_REWARDS)}"
                )
        if len(set(self.names)) < len(self.names):
            raise ConfigError(
                f"reward.functions is {self.functions}, of which two have one name, and so would their metrics; "
                "rename one"
            )
        if self.weights and len(self.weights) != len(self.functions):
            raise ConfigError(
                f"reward.weights has {len(self.weights)} numbers for {len(self.functions)} of reward.functions; give "
                "one each, or []"
            )
        if not all(map(math.isfinite, self.weights)):
            raise ConfigError(f"reward.weights is {self.weights}; each must be a finite number")


@dataclass(frozen=True)
class EnvironmentConfig:
    """Several turns: an environment (a tool, a teacher, a game) answers the policy, which then goes on.

    Args:
        function: as "module:function" or "path/to/file.py:function"; called as function(episode) after each turn that
            the policy ends by itself; returns text, or None where the episode is over (trainers/conversation.py;
            trainers.calculator:calculator is an example). null has no environment: a response is one turn.
        max_turns: of the policy, at most. sampling.max_tokens counts its tokens of all turns together; the observations
            have what rollout.max_model_len leaves.
        role: whose message an observation is in the model's chat template; none takes the text as it stands, as a model
            without a template does.
        workers: processes a rank that ask the function, so that a slow or failing one is bounded; 0 asks in the rank
            itself, where nothing bounds it.
        timeout_s: of one answer in a worker; the worker is then ended and replaced.
        on_error: what happens where the function raises, gives no text or runs out of time - raise ends the run, cut
            ends the rollout as a limit would and counts it in rollout/environment_failed.

    >>> EnvironmentConfig(function="calculator")
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: environment.function is 'calculator'; give module:function, path/to/file.py:function \
or null
    """

    function: str | None = None
    max_turns: int = 4
    role: Literal["user", "tool", "none"] = "user"
    workers: int = 0
    timeout_s: float = 20.0
    on_error: Literal["raise", "cut"] = "raise"

    def __post_init__(self) -> None:
        check_least("environment", self, {"max_turns": 2, "workers": 0})
        check_above_zero("environment", self, "timeout_s")
        if self.function is not None and not re.fullmatch(FUNCTION_PATH, self.function):
            raise ConfigError(
                f"environment.function is {self.function!r}; give module:function, path/to/file.py:function or null"
            )


@dataclass(frozen=True)
class PartialConfig:
    """Long responses in parts, so that no step waits for the longest one (partial rollouts, as in Kimi k1.5, arXiv
    2501.12599): a response that is not done in a step is carried to the next one, where the new policy goes on with it.

    A prompt is trained on when all of its responses are done. Each token keeps the log-prob of the policy that sampled
    it: with old_logprobs=engine the ratio starts from it; with old_logprobs=trainer it starts from the policy before
    the update, and mismatch corrects for age and engine together.

    Args:
        tokens_per_step: that the policy may add to a response in a step; null carries none.
        max_age: steps that a response may be carried; in the last one it runs to its end.

    >>> PartialConfig(tokens_per_step=0)
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: partial.tokens_per_step is 0; it must be at least 1
    """

    tokens_per_step: int | None = None
    max_age: int = 4

    @property
    def is_on(self) -> bool:
        """True if responses are carried."""
        return self.tokens_per_step is not None

    def __post_init__(self) -> None:
        check_least("partial", self, {"tokens_per_step": 1, "max_age": 1})


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on prompts that are not trained on.

    Args:
        every: steps from one evaluation to the next, the first before the first update and one more after the last;
            null never evaluates in training.
        held_out: share of the distinct problems of `data` that is kept out of the training, to evaluate on; drawn by
            data.seed. Of arithmetic a pair of operands is held out in both orders and with all operators. 0 keeps all.
        source: a data set of its own to evaluate on; null takes data.source.
        split: of that data set; null takes data.split.
        subset: of that data set; null takes data.subset, or, where `source` is set, its default.
        prompt_column: of that data set; null takes data.prompt_column.
        answer_column: of that data set; null takes data.answer_column.
        instruction: text added to each question; null takes data.instruction.
        prompts: of one evaluation, all ranks together, the same ones each time; null takes all there are.
        n: sampled responses a prompt, for avg_at_k and pass_at_k, beside the greedy one for accuracy.
        temperature: of the sampled ones (the rest as in `sampling`); 0 leaves them out, greedy alone.
        k: of pass_at_k; null takes n.
        right_at: the least score of a right response.

    >>> EvaluationConfig(every=5)
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: evaluation.every is 5, but there is nothing to evaluate on that is not trained on; \
set evaluation.held_out=0.1, say, or evaluation.source or evaluation.split
    """

    every: int | None = None
    held_out: float = 0.0
    source: str | None = None
    split: str | None = None
    subset: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    instruction: str | None = None
    prompts: int | None = 128
    n: int = 4
    temperature: float = 1.0
    k: int | None = None
    right_at: float = 1.0

    @property
    def has_own_data(self) -> bool:
        """True where other data is named than the training's."""
        return any(each is not None for each in (self.source, self.split, self.subset))

    def __post_init__(self) -> None:
        check_least("evaluation", self, {"every": 1, "prompts": 1, "n": 1, "temperature": 0, "k": 1})
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(f"evaluation.held_out is {self.held_out}; it must be at least 0 and below 1")
        if self.k is not None and self.k > self.n:
            raise ConfigError(
                f"evaluation.k is {self.k}, but each prompt gets only {self.n} sampled responses; lower it or raise "
                "evaluation.n"
            )
        if self.held_out and self.has_own_data:
            raise ConfigError(
                f"evaluation.held_out is {self.held_out}, but evaluation.source, split or subset names other data; set "
                "one of the two"
            )
        if self.every is not None and not self.held_out and not self.has_own_data:
            raise ConfigError(
                f"evaluation.every is {self.every}, but there is nothing to evaluate on that is not trained on; set "
                "evaluation.held_out=0.1, say, or evaluation.source or evaluation.split"
            )


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
        check_least("optimizer", self, dict.fromkeys(least, 0))
        check_above_zero("optimizer", self, "eps", "max_grad_norm")
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
        timeline_steps: steps, from 0, of which RUN/timeline gets a picture of what each thread of each rank did
            (docs/timeline.md); [] draws none and costs nothing.
    """

    directory: str = "runs"
    name: str | None = None
    seed: int = 0
    progress: bool = True
    private: bool = True
    timeline_steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_least("run", self, {"seed": 0})
        if not all(step >= 0 for step in self.timeline_steps):
            raise ConfigError(f"run.timeline_steps is {self.timeline_steps}; steps are counted from 0")
        if self.name is not None and (self.name in ("", ".", "..") or Path(self.name).name != self.name):
            raise ConfigError(f"run.name is {self.name!r}; it must name one folder (set run.directory for the rest)")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run while it goes on, to go on from.

    Args:
        every: steps between two checkpoints in RUN/checkpoints; the last step has one too. null writes none (the end
            of a run exports its policy in any case).
        keep: whole checkpoints to keep; older ones are deleted after a new one is whole.
        resume: go on in an old run's folder - a run's folder (its newest whole checkpoint), one of its checkpoints
            (what came after it is dropped), or auto (the newest of the folder that run.name names; a new run where
            there is none yet). null starts a new run.
        accept: keys that may differ from the checkpoint's when a run goes on, though they change what it learns, e.g.
            ["optimizer.learning_rate"]; from there on it is another run.
    """

    every: int | None = None
    keep: int = 2
    resume: str | None = None
    accept: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_least("checkpoint", self, {"every": 1, "keep": 1})
        if self.resume == "":
            raise ConfigError("checkpoint.resume is empty; give a run's folder, a checkpoint's, auto or null")
        if self.resume == "auto" and self.every is None:
            raise ConfigError(
                "checkpoint.resume is auto and checkpoint.every is null, so that there would never be a checkpoint; "
                "set checkpoint.every=1, say"
            )

    def is_due(self, step: int, last: bool) -> bool:
        """True if a checkpoint follows this step, counted from 0.

        >>> [CheckpointConfig(every=2).is_due(step, last=step == 4) for step in range(5)]
        [False, True, False, True, True]
        """
        return self.every is not None and (last or (step + 1) % self.every == 0)


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
class Experiment:
    """What every experiment has, whatever its algorithm.

    Args:
        model: the policy to train
        lora: adapters that are trained in place of the whole policy
        rollout: the engine that generates (vLLM inside the trainer's processes)
        sampling: how responses are drawn
        data: the prompts and their answers
        reward: how a response is scored
        environment: what answers the policy, where a response has several turns
        partial: responses that a step does not wait for
        evaluation: accuracy on prompts that are not trained on
        optimizer: AdamW
        run: where the run is recorded
        wandb: Weights & Biases
        checkpoint: what is kept to go on from

    Raises:
        ConfigError: if two keys contradict each other, or a number is not finite.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    partial: PartialConfig = field(default_factory=PartialConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def algorithm(self) -> Hyperparameters:
        """The section named after the algorithm."""
        raise NotImplementedError

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
            raise ConfigError(
                "sampling.temperature is 0 (greedy); the policy learns from sampled responses: set it above 0"
            )
        if self.checkpoint.resume == "auto" and self.run.name is None:
            raise ConfigError(
                "checkpoint.resume is auto, which looks into the folder that run.name names, and run.name is null; set "
                "run.name, or give the folder to resume"
            )

    @property
    def needs_old_logprobs(self) -> bool:
        """True if the trainer's log-probs are wanted before the first update: as the algorithm says, or undropped."""
        return self.algorithm.needs_old_logprobs or self.lora.dropout > 0

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens that a full-length response leaves to the prompt within rollout.max_model_len."""
        return self.rollout.max_model_len - self.sampling.max_tokens


@dataclass(frozen=True)
class PPOConfig(Experiment):
    """One PPO experiment: `scripts/ppo.py`.

    Args:
        ppo: the algorithm

    >>> PPOConfig(rollout=RolloutConfig(max_model_len=64))
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: sampling.max_tokens is 64 and rollout.max_model_len is 64, which leaves no room for \
a prompt; raise rollout.max_model_len or lower sampling.max_tokens
    """

    ppo: PPOHyperparameters = field(default_factory=PPOHyperparameters)

    @property
    def algorithm(self) -> PPOHyperparameters:
        """PPO's section."""
        return self.ppo

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_training(self, whole_critic=self.ppo.critic is not None)
        _check_partial(self)


@dataclass(frozen=True)
class GRPOConfig(Experiment):
    """One experiment with GRPO or its kin: `scripts/grpo.py`.

    Args:
        grpo: the algorithm

    >>> GRPOConfig(sampling=SamplingConfig(n=1))
    Traceback (most recent call last):
    ...
    trainers.errors.ConfigError: sampling.n is 1, but grpo.advantage=grpo compares a response with the others to its \
prompt; set sampling.n=8, say
    """

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=8))
    grpo: GRPOHyperparameters = field(default_factory=GRPOHyperparameters)

    @property
    def algorithm(self) -> GRPOHyperparameters:
        """GRPO's section."""
        return self.grpo

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_training(self)
        _check_partial(self)
        if self.sampling.n < 2 and self.grpo.advantage != "reinforce_pp":
            raise ConfigError(
                f"sampling.n is {self.sampling.n}, but grpo.advantage={self.grpo.advantage} compares a response with "
                "the others to its prompt; set sampling.n=8, say"
            )


@dataclass(frozen=True)
class EvaluateConfig(Experiment):
    """The evaluation of one model: `scripts/evaluate.py`. A run's own config.yaml serves as it is.

    Args:
        ppo: unused here
        grpo: unused here
    """

    ppo: PPOHyperparameters = field(default_factory=PPOHyperparameters)
    grpo: GRPOHyperparameters = field(default_factory=GRPOHyperparameters)


def _check_training(config: Experiment, whole_critic: bool = False) -> None:
    """What an update asks of the rest of the config.

    Args:
        whole_critic: True if a critic of its own is trained, which has no adapters.
    """
    hyper, sampling = config.algorithm, config.sampling
    name = hyper.section
    if config.model.dtype == "bfloat16" and (config.lora.rank is None or whole_critic):
        raise ConfigError(
            "model.dtype is bfloat16, in which weights move by 1/256 of themselves at least: an update of a usual "
            "learning rate is rounded away. Set model.dtype=float32 (with model.sharding=fsdp2 if that does not fit), "
            "or train adapters with lora.rank"
            + (f", without a critic of its own ({name}.critic=null)" if whole_critic else "")
        )
    shaped = [key for key in ("top_p", "top_k", "min_p") if getattr(sampling, key) != getattr(SamplingConfig(), key)]
    if shaped and (hyper.old_logprobs == "engine" or hyper.mismatch != "no"):
        because = f"{name}.old_logprobs is engine" if hyper.old_logprobs == "engine" else f"{name}.mismatch is in use"
        raise ConfigError(
            f"sampling.{shaped[0]} is {getattr(sampling, shaped[0])} and {because}: the engine's log-probs are of the "
            "distribution that is cut, the trainer's of the whole one, and their ratio would not be 1 for one policy; "
            f"leave sampling.{shaped[0]} at {getattr(SamplingConfig(), shaped[0])}, or set {name}.old_logprobs=trainer "
            f"and {name}.mismatch=no"
        )


def _check_partial(config: Experiment) -> None:
    """What carried responses ask of the rest of the config."""
    tokens, hyper = config.partial.tokens_per_step, config.algorithm
    if tokens is None:
        return
    if tokens >= config.sampling.max_tokens:
        raise ConfigError(
            f"partial.tokens_per_step is {tokens} and sampling.max_tokens {config.sampling.max_tokens}, so that no "
            "response would ever be carried; lower partial.tokens_per_step, or set it to null"
        )
    name = hyper.section
    if hyper.old_logprobs == "trainer" and hyper.mismatch == "no":
        raise ConfigError(
            f"partial.tokens_per_step is {tokens}, {name}.old_logprobs is trainer and {name}.mismatch is no, which "
            f"would take tokens of older policies for the present one's; set {name}.old_logprobs=engine or "
            f"{name}.mismatch=truncate"
        )
    if hyper.max_rounds > 1:
        raise ConfigError(
            f"partial.tokens_per_step is {tokens} and {name}.oversample is {hyper.max_rounds - 1}: a step whose "
            f"prompts are still being answered cannot tell how many more it needs; set {name}.oversample=0"
        )


def _check_finite(config: Any) -> None:
    for section in fields(config):
        for key in fields(getattr(config, section.name)):
            value = getattr(getattr(config, section.name), key.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{section.name}.{key.name} is {value}; it must be a finite number")
