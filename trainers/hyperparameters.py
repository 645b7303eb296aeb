"""What the algorithms can be told: one section of the config each, named after the algorithm."""

from dataclasses import dataclass
from typing import Literal

from trainers.errors import ConfigError, check_above_zero, check_least


@dataclass(frozen=True)
class Hyperparameters:
    """What every algorithm can be told.

    Args:
        steps: rounds of generate, score and update.
        prompts_per_step: prompts of one step, all ranks together; each gets sampling.n responses.
        epochs: passes over the responses of a step.
        minibatches: optimizer updates a pass; the responses are split evenly among them.
        micro_batch_tokens: tokens of one forward and backward pass on this rank, prompts included; changes memory
            and speed, not the result.
        clip_range: how far below 1 the policy's ratio may go, and above, before its gradient is cut (PPO, arXiv
            1707.06347).
        clip_range_high: how far above, if that is another number (DAPO's clip-higher, arXiv 2503.14476).
        dual_clip: bound, above 1, of the ratio where the advantage is negative (arXiv 1912.09729); null has none.
        loss_mean: what the policy loss is a mean over - token (all tokens of the minibatch alike, DAPO), sequence (of
            each response its own mean, as in GRPO, so that long ones count less a token) or constant (the sum over
            responses times sampling.max_tokens, as in Dr. GRPO, arXiv 2503.20783).
        entropy_coef: weight of the entropy bonus; 0 switches it off.
        kl_coef: weight of the KL penalty against the frozen first policy, a token; 0 loads no reference model.
        kl_in: where the penalty goes - reward (a part of each token's reward) or loss (a term of the loss).
        kl_estimator: of that penalty - k1 (log-ratio), k2 (half its square) or k3 (Schulman 2020,
            joschu.net/blog/kl-approx.html); null takes k1 in the reward and k3 in the loss. Others do not pull
            towards the reference there; in the loss k2 has the gradient of the KL, k3 nearly (arXiv 2506.09477).
        old_logprobs: whose log-probs the ratio starts from - trainer (computed anew before the first update, or for
            nothing where a batch makes a single update) or engine (as sampled: one pass less, and the ratio also
            corrects for what engine and trainer disagree in).
        mismatch: what is done about tokens on which trainer and engine disagree - no, truncate (the loss of a token
            is weighted by trainer's / engine's probability, at most the upper bound) or mask (those outside of the
            bounds are left out, the rest weighted).
        mismatch_level: of that ratio - token, or sequence (the product over a response).
        mismatch_bounds: lower and upper; truncate uses the upper one.
    """

    steps: int = 30
    prompts_per_step: int = 128
    epochs: int = 1
    minibatches: int = 2
    micro_batch_tokens: int = 4096
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    mismatch: Literal["no", "truncate", "mask"] = "no"
    mismatch_level: Literal["token", "sequence"] = "token"
    mismatch_bounds: tuple[float, float] = (0.5, 2.0)

    @property
    def section(self) -> str:
        """Of the YAML: the algorithm's name."""
        raise NotImplementedError

    @property
    def drops_equal_groups(self) -> bool:
        """True if prompts whose responses all score alike are not trained on."""
        return False

    @property
    def max_rounds(self) -> int:
        """Generations a step, at most."""
        return 1

    @property
    def reward_kl_coef(self) -> float:
        """Of the penalty in the rewards; 0 where it is in the loss."""
        return self.kl_coef if self.kl_in == "reward" else 0.0

    @property
    def estimator(self) -> Literal["k1", "k2", "k3"]:
        """Of the KL penalty: as `kl_estimator` says, or the usual one of its place."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    @property
    def needs_old_logprobs(self) -> bool:
        """True if the trainer's log-probs are wanted before the first update: by a second one, or by the rewards."""
        updates = self.epochs * self.minibatches
        return bool(self.reward_kl_coef) or (self.old_logprobs == "trainer" and updates > 1)

    def __post_init__(self) -> None:
        name = self.section
        counts = ("steps", "prompts_per_step", "epochs", "minibatches", "micro_batch_tokens")
        check_least(name, self, dict.fromkeys(counts, 1))
        check_least(name, self, {"entropy_coef": 0, "kl_coef": 0})
        check_above_zero(name, self, "clip_range", "clip_range_high")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigError(f"{name}.dual_clip is {self.dual_clip}; it must be above 1, or null")
        if self.kl_coef and (self.kl_in == "loss") == (self.estimator == "k1"):
            gradient, other = ("0", "k2 or k3") if self.kl_in == "loss" else ("not that of the KL", "k1")
            elsewhere = "reward" if self.kl_in == "loss" else "loss"
            raise ConfigError(
                f"{name}.kl_in is {self.kl_in} and {name}.kl_estimator is {self.estimator}, whose gradient is then "
                f"{gradient} on average; set {name}.kl_estimator={other}, or {name}.kl_in={elsewhere}"
            )
        if self.mismatch != "no" and self.old_logprobs == "engine":
            raise ConfigError(
                f"{name}.mismatch is {self.mismatch} and {name}.old_logprobs is engine, which would correct for the "
                f"same disagreement twice; set {name}.old_logprobs=trainer or {name}.mismatch=no"
            )
        low, high = self.mismatch_bounds
        if not 0 <= low < 1 < high:
            raise ConfigError(
                f"{name}.mismatch_bounds is {list(self.mismatch_bounds)}; give one number of at least 0 and below 1, "
                "and one above 1"
            )


@dataclass(frozen=True)
class PPOHyperparameters(Hyperparameters):
    """Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv 1707.06347).

    Args:
        gamma: discount of the return, a token.
        lam: lambda of generalised advantage estimation (arXiv 1506.02438).
        critic: model of the critic, a local folder or hub name (model.path starts it where the policy starts); null
            puts a value head on the policy's own trunk.
        value_clip_range: how far a value may leave its old one; null switches value clipping off.
        value_coef: weight of the value loss.
        whiten_advantages: true scales the advantages of a step to mean 0 and variance 1 over all ranks.
    """

    gamma: float = 1.0
    lam: float = 1.0
    critic: str | None = None
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    whiten_advantages: bool = True

    @property
    def section(self) -> str:
        """The name ppo, in the YAML too."""
        return "ppo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("ppo", self, {"value_coef": 0})
        check_above_zero("ppo", self, "value_clip_range")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"ppo.{name} is {value}; it must be at least 0 and at most 1")


@dataclass(frozen=True)
class GRPOHyperparameters(Hyperparameters):
    """Policy gradients without a critic: a response is compared with the others to its prompt (sampling.n of them).

    Args:
        advantage: of a response - grpo (its score less the group's mean, over the group's deviation; arXiv
            2402.03300), dr_grpo (without the deviation; arXiv 2503.20783), rloo (less the mean of the others; arXiv
            2402.14740) or reinforce_pp (no group: scaled over the whole batch; arXiv 2501.03262).
        filter_groups: true leaves out prompts whose responses all score alike (DAPO's dynamic sampling, arXiv
            2503.14476).
        oversample: with filter_groups, generations of as many fresh prompts again, at most, until prompts_per_step
            are found; if they are not, the step trains on those that are.
    """

    prompts_per_step: int = 16
    minibatches: int = 1
    kl_in: Literal["reward", "loss"] = "loss"
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] = "grpo"
    filter_groups: bool = False
    oversample: int = 0

    @property
    def section(self) -> str:
        """The name grpo, in the YAML too."""
        return "grpo"

    @property
    def drops_equal_groups(self) -> bool:
        """As `filter_groups` says."""
        return self.filter_groups

    @property
    def max_rounds(self) -> int:
        """The first generation, and those of `oversample`."""
        return 1 + self.oversample

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("grpo", self, {"oversample": 0})
        if self.oversample and not self.filter_groups:
            raise ConfigError(
                f"grpo.oversample is {self.oversample}, but nothing is dropped; set grpo.filter_groups=true or "
                "grpo.oversample=0"
            )
        if self.filter_groups and self.advantage == "reinforce_pp":
            raise ConfigError(
                "grpo.filter_groups is true, but grpo.advantage=reinforce_pp learns from groups that score alike, too; "
                "set grpo.filter_groups=false or another grpo.advantage"
            )
