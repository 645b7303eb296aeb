"""FSDP2: weights, gradients and optimizer state in shards over all ranks, and what a trainer has to mind then.

Each decoder layer is a unit: gathered when its turn comes, let go when it is over. What is left of the policy
(embedding, last norm, output head) is the root unit. The rules of the game: every pass is a collective, so all ranks
make equally many; a module's weights are whole only inside its own forward pass, and while the gradient comes back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from trainers.across_ranks import max_over_ranks
from trainers.policy import Policy

AUTOCAST: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By model.autocast, the dtype in which the layers' weights travel and are whole; None is their own."""


def shard(policy: Policy, device: torch.device, autocast: str = "no") -> None:
    """Put a policy into shards over all ranks, in place; each holds its own on the device from then on.

    The numbers stay DDP's. Under autocast a layer's matrices are cast before they travel instead of before they are
    multiplied by, so that half the bytes travel; all that autocast leaves alone (norms, embedding, the stream between
    the layers, value head) keeps its own dtype. Gradients are reduced in float32 or wider.

    Args:
        policy: the same on every rank, on any device; one that is frozen is a reference.
        device: of this rank.
        autocast: model.autocast; the passes run under the same.

    Raises:
        ValueError: if the model does not say which of its modules are layers.
    """
    # The default group, not one more: a group of gloo's has a socket of its own.
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)

    def unit(module: nn.Module | list[nn.Module], dtype: torch.dtype | None = None) -> None:
        first = next((module[0] if isinstance(module, list) else module).parameters())
        precision = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.promote_types(first.dtype, torch.float32),
            cast_forward_inputs=False,  # what autocast leaves in float32 stays so
        )
        fully_shard(module, mesh=mesh, mp_policy=precision)

    for model in (policy.language_model, policy.critic):
        for layer in decoder_layers(model) if model is not None else ():
            if AUTOCAST[autocast] is not None and (norms := without_matrices(layer)):
                unit(norms)
            unit(layer, AUTOCAST[autocast])
    for module in (policy.critic, policy.value_head):  # units of their own: a critic's trunk is whole in its turn only
        if module is not None:
            unit(module)
    unit(policy)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Those that must not be split, as transformers has it for each architecture.

    Raises:
        ValueError: if there is none.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} does not name its layers (_no_split_modules is {sorted(names)}), so that it "
            "cannot be sharded by them; set model.sharding=ddp"
        )
    return layers


def without_matrices(layer: nn.Module) -> list[nn.Module]:
    """The modules in it whose own parameters are vectors: its norms, which autocast does not cast.

    >>> without_matrices(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    [LayerNorm((2,), eps=1e-05, elementwise_affine=True, ...)]
    """
    own = {module: list(module.parameters(recurse=False)) for module in layer.modules()}
    return [module for module, weights in own.items() if weights and all(weight.dim() == 1 for weight in weights)]


def is_sharded(module: nn.Module | None) -> bool:
    """True for what `shard` was given."""
    return isinstance(module, FSDPModule)


def passes(parts: Sequence[torch.Tensor], model: nn.Module, device: torch.device) -> list[torch.Tensor | None]:
    """The passes that this rank makes for its micro-batches: of a sharded model as many as the rank with the most.

    A collective if the model is sharded.

    Args:
        parts: row numbers of each micro-batch of this rank.

    Returns:
        The parts; then None for each pass that is made, with a `stand_in`, for the other ranks' sake.

    >>> passes([torch.tensor([0, 1])], nn.Linear(1, 1), torch.device("cpu"))
    [tensor([0, 1])]
    """
    if not is_sharded(model):
        return [*parts]
    most = int(max_over_ranks(torch.tensor(len(parts), device=device)).item())
    return [*parts, *[None] * (most - len(parts))]


def put_away(module: nn.Module | None) -> None:
    """Have the root's shards back after passes without gradient, which end with its weights whole: with those, the
    module's parameters would not be what the optimizer, a checkpoint and the weight sync know.
    """
    if isinstance(module, FSDPModule):
        module.reshard()


@contextmanager
def gradients_stay(module: nn.Module) -> Iterator[None]:
    """Backward passes inside add up whole gradients on each rank; the next one outside reduces the sum.

    Saves a reduction a micro-batch, and takes the memory of all weights in float32.
    """
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)
