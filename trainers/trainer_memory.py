"""What training holds on a rank: what stays, and what a pass takes besides; plain arithmetic, held against torch's.

Of P weights of w bytes (4 in float32), T of them trained and N ranks, in bytes of one rank:

                    ddp             fsdp2
    weights         w P             w P / N
    gradients       w T             w T / N
    optimizer       2 w T           2 w T / N       AdamW's two moments, in the parameters' dtype (torch.optim.AdamW)
    reference       w P             w P / N         where there is a KL penalty, without adapters

T is all, or under LoRA the adapters, which are float32; their reference is the policy without them. DDP's gradients are
its buckets (gradient_as_bucket_view) and stay between updates; FSDP2 and a single rank let theirs go. While a minibatch
takes more than one pass, the passes before the last add up in gradients of their own: w T once more under DDP's
no_sync; 4 T, whole on each rank, with model.reduce_gradients=update; of a single rank and with micro_batch nothing.

Under FSDP2 a pass has besides what is whole: the root unit (embedding, head, last norm) from its first to its last
moment, and the layers whose turn it is (`Whole`). A critic's embedding is whole in the critic's turn.
"""

from dataclasses import dataclass

from trainers.activations import WIDE, Pass, Precision, head_block_bytes, kept_bytes, layer_bytes
from trainers.config import Experiment
from trainers.model_sizes import Adapters, ModelSizes

Parts = dict[str, int]
"""Bytes by what they are of."""


@dataclass(frozen=True)
class Models:
    """What a rank holds, or has its shards of.

    Attributes:
        policy: without a critic's head.
        critic: of its own trunk; None without.
        value_head: True if a value head reads the policy's trunk.
        reference: True where the KL penalty compares with the first policy.
        adapters: trained in place of the policy's own parameters; None without.
    """

    policy: ModelSizes
    critic: ModelSizes | None = None
    value_head: bool = False
    reference: bool = False
    adapters: Adapters | None = None

    @property
    def trained(self) -> int:
        """Parameters of the policy, or of its adapters, and of the critic."""
        critic = self.critic.parameters if self.critic else 0
        return self.of_policy_trained + critic + (self.policy.hidden + 1 if self.value_head else 0)

    @property
    def of_policy_trained(self) -> int:
        """The policy's part of them, a value head on its trunk left out."""
        return self.adapters.parameters if self.adapters else self.policy.parameters

    def trained_bytes(self, weight: int) -> int:
        """Of all that is trained, once: adapters are float32, all else has `weight` bytes."""
        adapters = self.adapters.parameters if self.adapters else 0
        return weight * (self.trained - adapters) + WIDE * adapters


def precision_of(config: Experiment, on_cpu: bool) -> Precision:
    """Of the trainer's passes."""
    return Precision.of(config.model.dtype, config.model.autocast, on_cpu, is_sharded(config))


def is_sharded(config: Experiment) -> bool:
    """True if the run trains in FSDP2's shards."""
    return config.model.sharding == "fsdp2"


def staying_bytes(config: Experiment, models: Models, precision: Precision, ranks: int) -> Parts:
    """From one step to the next: weights, moments, and DDP's buckets."""
    share = ranks if is_sharded(config) else 1
    w = precision.weights
    trained = models.trained_bytes(w)
    policy = w * (models.policy.parameters + (models.policy.hidden + 1 if models.value_head else 0))
    policy += WIDE * models.adapters.parameters if models.adapters else 0
    return {
        "policy": policy // share,
        "critic": w * models.critic.parameters // share if models.critic else 0,
        "reference": w * models.policy.parameters // share if models.reference and models.adapters is None else 0,
        "gradients": trained if has_buckets(config, ranks) else 0,
        "optimizer": 2 * trained // share,
    }


def has_buckets(config: Experiment, ranks: int) -> bool:
    """True under DDP, which accelerate leaves out of a job of one rank."""
    return ranks > 1 and not is_sharded(config)


def loading_bytes(models: Models, weight: int) -> int:
    """In the host's memory of a rank while policy and critic are read, before they are cut or moved to a device."""
    critic = models.critic.parameters if models.critic else 0
    return weight * (models.policy.parameters + critic)


def gradient_bytes(config: Experiment, models: Models, precision: Precision, ranks: int, passes: int) -> int:
    """At their most, in the last of an update's passes."""
    trained = models.trained_bytes(precision.weights)
    if not is_sharded(config):
        return trained * (2 if passes > 1 and ranks > 1 else 1)
    whole = WIDE * models.trained if passes > 1 and config.model.reduce_gradients == "update" else 0
    return max(whole, trained // ranks)


@dataclass(frozen=True)
class Whole:
    """What is whole of one sharded model in a pass, in bytes.

    Attributes:
        root: embedding, head and last norm, in their own dtype.
        layers: in a backward pass: one, what the next one was gathered into, and the one's gradients as they are made.
        reduced: the one's gradients as they are reduced, in float32, when what autograd kept of it has gone.
        gradients: of the root, at the backward's end, as they are made and as they are reduced.
    """

    root: int
    layers: int
    reduced: int
    gradients: int

    @classmethod
    def of(
        cls,
        config: Experiment,
        sizes: ModelSizes,
        precision: Precision,
        adapters: Adapters | None = None,
        head: bool = True,
    ) -> "Whole":
        """Of the policy, or with `head` False of a critic.

        All is 0 under DDP, but for the gradient of the embedding, which comes while the head's is still there.
        """
        w = precision.weights
        if not is_sharded(config):
            return cls(0, 0, 0, 0 if adapters else (2 if head else 1) * w * sizes.embedding)
        travels = w if config.model.autocast == "no" else precision.products
        added = adapters.parameters // sizes.layers if adapters else 0
        of_layer = sizes.matrices // sizes.layers + added
        trained = added if adapters else of_layer
        root = sizes.embedding + sizes.head
        return cls(
            root=w * root,
            layers=travels * (2 * of_layer + trained),
            reduced=WIDE * trained,
            gradients=0 if adapters else (w + WIDE) * root,
        )


def pass_bytes(config: Experiment, models: Models, step: Pass, precision: Precision) -> Parts:
    """Of the largest moment of a pass with gradient: what autograd keeps, the head, what is whole.

    Forward runs the policy, then a critic of its own; backward the critic first. The largest is where one of the two
    backward passes begins or ends.
    """
    policy, whole = models.policy, Whole.of(config, models.policy, precision, models.adapters)
    kept = kept_of_policy(config, models, step, precision)
    gradient = 0 if models.adapters else policy.vocabulary * policy.hidden * precision.weights
    forward, backward = head_block_bytes(policy, step, precision)
    moments = [
        _moment(kept, max(forward, gradient + backward), whole.root),
        *_layer_moments(config, policy, step, precision, models.adapters, kept, gradient, whole.root, whole),
        _moment(0, whole.gradients, whole.root),
    ]
    if models.critic:
        of_critic = Whole.of(config, models.critic, precision, head=False)
        both, roots = kept + kept_of_critic(config, models.critic, step, precision), whole.root + of_critic.root
        moments += _layer_moments(config, models.critic, step, precision, None, both, 0, roots, of_critic)
        moments.append(_moment(kept, of_critic.gradients, roots))
    return max(moments, key=lambda parts: sum(parts.values()))


def _layer_moments(
    config: Experiment,
    sizes: ModelSizes,
    step: Pass,
    precision: Precision,
    adapters: Adapters | None,
    kept: int,
    head: int,
    root: int,
    whole: Whole,
) -> list[Parts]:
    """Of the last layer's backward pass: what it computes with; then what is reduced, its activations gone."""
    layer = layer_bytes(sizes, step, precision, adapters)
    computed, let_go = kept, kept - layer
    if config.model.gradient_checkpointing:
        copies = sizes.matrices // sizes.layers * precision.products if precision.copies_weights else 0
        computed, let_go = kept + layer + copies, kept
    return [
        _moment(computed, head, root + whole.layers),
        _moment(let_go, head, root + whole.layers + whole.reduced),
    ]


def _moment(activations: int, head: int, whole: int) -> Parts:
    return {"activations": activations, "head": head, "whole weights": whole}


def kept_of_policy(config: Experiment, models: Models, step: Pass, precision: Precision) -> int:
    """By autograd when a pass's forward has ended."""
    kept = kept_bytes(models.policy, step, precision, config.model.gradient_checkpointing, adapters=models.adapters)
    # The value head reads float32.
    return kept + (step.predicting * models.policy.hidden * WIDE if models.value_head else 0)


def kept_of_critic(config: Experiment, critic: ModelSizes, step: Pass, precision: Precision) -> int:
    """The same of a critic's own trunk."""
    return kept_bytes(critic, step, precision, config.model.gradient_checkpointing, head=False)
