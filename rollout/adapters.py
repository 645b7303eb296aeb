"""Adapters of PEFT's LoRA: what a policy that has them computes with, under the names of the model that it is based on.

PEFT is not imported: its layers are known by what they hold. A matrix W under adapters counts as W + scaling * B @ A,
computed when somebody wants it, one parameter at a time: never a whole second model. Whatever would count as something
else is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.tensor import DTensor

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Adapter:
    """What one adapter adds to a matrix: scaling * B @ A.

    Attributes:
        a: (rank, inputs).
        b: (outputs, rank).
        transposed: True if the matrix is (inputs, outputs): an embedding's, or a Conv1D's of transformers.
    """

    scaling: float
    a: torch.Tensor
    b: torch.Tensor
    transposed: bool


@dataclass(frozen=True)
class LoraWeight:
    """A matrix under adapters. Any of the tensors may be sharded (FSDP2): the ranks then merge together.

    Attributes:
        base: frozen or not, never changed here.
        adapters: at least one; added in their order.
        sign: of the whole, 1 or -1.
    """

    base: torch.Tensor
    adapters: tuple[Adapter, ...]
    sign: int = 1

    @property
    def shape(self) -> torch.Size:
        """Of the whole matrix."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """In which it is computed: float32, or wider if the base is."""
        return torch.promote_types(self.base.dtype, torch.float32)

    @property
    def num_bytes(self) -> int:
        """Of all that is read."""
        read = [self.base, *(each for adapter in self.adapters for each in (adapter.a, adapter.b))]
        return sum(tensor.numel() * tensor.element_size() for tensor in read)

    def __neg__(self) -> "LoraWeight":
        return replace(self, sign=-self.sign)

    @torch.no_grad()
    def merged(self, memory: torch.Tensor | None = None) -> torch.Tensor:
        """The whole matrix in `dtype`; in the order of PEFT's own merge, so in float32 the same to its last bit.

        Args:
            memory: (elements of the matrix,) in `dtype`, to be taken for it; None takes new memory.

        >>> adapter = Adapter(2.0, a=torch.tensor([[1.0, 0.0]]), b=torch.tensor([[0.5]]), transposed=False)
        >>> LoraWeight(torch.tensor([[3.0, 4.0]]), (adapter,)).merged()
        tensor([[4., 4.]])
        """
        total = whole(self.base)
        for adapter in self.adapters:
            b, a = (whole(factor).to(self.dtype) for factor in (adapter.b, adapter.a))
            out = None if memory is None else memory.view(b.shape[0], a.shape[1])
            with torch.autocast(b.device.type, enabled=False):
                product = torch.mm(b, a, out=out)
            # The product's own memory takes the sum: the base, and its dtype, are left alone.
            total = (product.T if adapter.transposed else product).mul_(adapter.scaling).add_(total)
            memory = None  # of the first alone
        return total if self.sign > 0 else total.neg_()


Weight = torch.Tensor | LoraWeight
"""A policy's parameter as it is, or under adapters."""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, by all ranks together, in its global shape; any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def has_adapters(policy: nn.Module) -> bool:
    """True if PEFT has changed the model: in a wrapper of its own, or in place."""
    return hasattr(policy, "peft_config") or any(_is_peft(module) for module in policy.modules())


def check_adapters(policy: nn.Module) -> None:
    """See that every parameter of a policy with adapters can be merged; does nothing to a plain one, and reads nothing.

    Raises:
        ValueError: if not: what is in the way, and what to do.
    """
    policy = unwrapped(policy)
    if has_adapters(policy):
        for _ in merged_weights(policy):
            pass


def unwrapped(policy: nn.Module) -> nn.Module:
    """Without DDP."""
    return policy.module if isinstance(policy, nn.parallel.DistributedDataParallel) else policy


def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The parameters of the model under the adapters, by their own names; tied ones once.

    What adapters do at the moment counts: those that are switched off, or merged already, add nothing.

    Args:
        policy: has adapters; without DDP.

    Raises:
        ValueError: as of `check_adapters`.
    """
    _refuse_other_methods(policy)
    base = getattr(policy, "get_base_model", None)  # of PEFT's wrapper; adapters may be in the model without one
    model = base() if callable(base) else policy
    seen: dict[int, tuple[str, Weight]] = {}
    for name, original, weight in _walk(model, ""):
        if id(original) not in seen:
            seen[id(original)] = name, weight
            yield name, weight
        elif not _same(seen[id(original)][1], weight):
            _refuse(
                f"{seen[id(original)][0]} and {name} are tied in the model, and the adapters set them apart",
                "the engine has one matrix for both",
                "leave both out of target_modules and modules_to_save, or set ensure_weight_tying=True in the "
                "LoraConfig",
            )


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter, Weight]]:
    """Name, the parameter of the model under the adapters, and what stands there now."""
    if "base_layer" in module._modules:
        yield from _of_layer(module, prefix)
    elif "original_module" in module._modules:
        yield from _of_replaced(module, prefix)
    else:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, _plain(parameter)
        for name, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{prefix}{name}.")


def _of_layer(layer: Any, prefix: str) -> Iterator[tuple[str, nn.Parameter, Weight]]:
    """Of a layer under adapters."""
    name, base = prefix.removesuffix("."), layer.base_layer
    if not hasattr(layer, "lora_A") or "base_layer" in base._modules or hasattr(layer, "parameter_name"):
        _refuse(
            f"the policy's {name} is {type(layer).__name__} of {type(layer).__module__}",
            "no plain LoRA of one matrix",
            "train with LoraConfig(target_modules=...), or sync a merged copy (merge_and_unload)",
        )
    weight = base._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not _is_plain(weight):
        what = "no weight of its own" if weight is None else f"a weight of {_kind(weight)}"
        _refuse(
            f"the policy's {name} ({type(base).__name__}) has {what}, {_shape(weight)}",
            "an adapter is merged into a matrix in float32, bfloat16 or float16 alone, not into a quantised one",
            "load the base model in bfloat16, without a quantization_config, or take the layer out of target_modules",
        )
    adapters = tuple(_adapter(layer, each, name) for each in _adding(layer, name))
    for leaf, parameter in base.named_parameters():
        under = adapters if parameter is weight else ()
        yield prefix + leaf, parameter, LoraWeight(_plain(parameter), under) if under else _plain(parameter)


def _adding(layer: Any, name: str) -> list[str]:
    """The adapters whose product the layer's forward adds."""
    if layer.disable_adapters and layer.merged_adapters:
        _refuse(
            f"the adapters of the policy's {name} are switched off and merged at once",
            "the base's own weights are not there before the next forward pass",
            "call unmerge_adapter() first",
        )
    if layer.disable_adapters or layer.merged_adapters:
        return []
    return [each for each in layer.active_adapters if each in layer.lora_A or each in layer.lora_embedding_A]


def _adapter(layer: Any, adapter: str, name: str) -> Adapter:
    """One adapter of a layer.

    Raises:
        ValueError: if it does more than to add a product.
    """
    where = f"adapter {adapter!r} of the policy's {name}"
    variant = layer.lora_variant.get(adapter) if hasattr(layer, "lora_variant") else None
    if variant is not None or layer.use_dora.get(adapter):
        kind = "DoRA" if layer.use_dora.get(adapter) else type(variant).__name__
        _refuse(f"{where} is {kind}", "more than W + scaling * B @ A", "train with plain LoRA (use_dora=False)")
    weight = layer.base_layer.weight
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        transposed = True
    else:
        if getattr(layer.lora_B[adapter], "bias", None) is not None:
            _refuse(f"{where} has a bias of its own", "the engine's layer may have none", "train with lora_bias=False")
        a, b = (getattr(each[adapter], "weight", None) for each in (layer.lora_A, layer.lora_B))
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
    expected = (weight.shape[1], weight.shape[0]) if transposed else tuple(weight.shape)
    if a is None or b is None or (b.shape[0], a.shape[1]) != expected or b.shape[1] != a.shape[0]:
        _refuse(f"{where} has factors that do not fit {_shape(weight)}", "no plain LoRA", "train with a LoraConfig")
    return Adapter(float(layer.scaling[adapter]), _plain(a), _plain(b), transposed)


def _of_replaced(wrapper: Any, prefix: str) -> Iterator[tuple[str, nn.Parameter, Weight]]:
    """Of a module that is trained whole (modules_to_save): the copy that is active."""
    name = prefix.removesuffix(".")
    if "modules_to_save" not in wrapper._modules:
        _refuse(
            f"the policy's {name} is {type(wrapper).__name__}",
            "of PEFT's wrappers only modules_to_save replaces a whole module",
            "train without trainable_token_indices; modules_to_save takes the whole embedding",
        )
    active = [each for each in wrapper.active_adapters if each in wrapper.modules_to_save]
    used = wrapper.modules_to_save[active[0]] if active and not wrapper.disable_adapters else wrapper.original_module
    originals = dict(wrapper.original_module.named_parameters())
    for name, original, weight in _walk(used, ""):
        yield prefix + name, originals.get(name, original), weight


def _refuse_other_methods(policy: nn.Module) -> None:
    for name, config in getattr(policy, "peft_config", {}).items():
        method = getattr(config.peft_type, "value", config.peft_type)
        if method != "LORA":
            _refuse(
                f"the policy's adapter {name!r} is of PEFT's {method}",
                "only LoRA's adapters are merged on the way",
                "train with a LoraConfig, or sync a merged copy (merge_and_unload)",
            )


def _is_peft(module: nn.Module) -> bool:
    return "base_layer" in module._modules or "original_module" in module._modules


def _is_plain(weight: torch.Tensor) -> bool:
    """A tensor of numbers as they are, whole or sharded; not a subclass with another meaning of its bytes."""
    data = weight.data
    data = data.to_local() if isinstance(data, DTensor) else data
    return weight.dtype in PLAIN_DTYPES and type(data) is torch.Tensor


def _plain(parameter: torch.Tensor) -> torch.Tensor:
    # Detaching a sharded one takes as long as copying a small layer: whoever reads its shard does without.
    return parameter if isinstance(parameter, DTensor) else parameter.detach()


def _same(one: Weight, other: Weight) -> bool:
    """True if two names of one parameter stand for the same numbers: the same memory, in the same way."""
    if isinstance(one, LoraWeight) and isinstance(other, LoraWeight):
        return _factors(one) == _factors(other) and _same(one.base, other.base)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return _memory(one) == _memory(other)
    return False


def _factors(weight: LoraWeight) -> list[tuple[float, frozenset[int]]]:
    """A tied head's adapter has the embedding's factors, the one for the other."""
    return [(each.scaling, frozenset((_memory(each.a), _memory(each.b)))) for each in weight.adapters]


def _memory(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()


def _kind(weight: torch.Tensor) -> str:
    named = "" if type(weight.data) in (torch.Tensor, DTensor) else f"{type(weight.data).__name__}, "
    return f"{named}{weight.dtype}"


def _shape(weight: torch.Tensor | None) -> str:
    return "" if weight is None else f"shape {tuple(weight.shape)}"


def _refuse(what: str, why: str, mend: str) -> NoReturn:
    raise ValueError(f"{what}: {why}. To sync it, {mend}")
