"""The policy's weights into the worker's: copies by a plan, or vLLM's reload where there is none.

The first sync goes through vLLM's reload and derives the plan. Before the plan is trusted it has to undo another load
exactly: weights of the other sign go in by the plan, then the policy's, and every layer must be, bit for bit, what the
reload had made of it. Each layout of a sharded policy is proven so.
"""

import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.v1.worker.worker_base import WorkerBase

from rollout.adapters import LoraWeight, Weight
from rollout.backend.planned_sync import Layout, PlannedSync, Weights, layout_of, whole_weight
from rollout.backend.sync_plan import Layer, NoPlan, make_plan
from rollout.backend.weight_check import PROBES
from rollout.backend.worker import reload_policy_weights
from rollout.failure import beat
from rollout.spans import span
from rollout.world import gathered

CHECKED_LAYERS = 4
"""Of a sync, in turn: within a twentieth of its time (docs/results.md)."""


@dataclass(frozen=True)
class Loaded:
    """What one sync did.

    Attributes:
        num_bytes: of the policy's parameters that were read.
        planned: True if they went by the plan; False if vLLM reloaded them.
    """

    num_bytes: int
    planned: bool


class WeightSync:
    """A worker's weights, and how to replace them. On the execute thread.

    Args:
        worker: vLLM's.
        reads_head: True if the sampler reads the output head's weight as it is, and nobody its packed copy.
    """

    def __init__(self, worker: WorkerBase, reads_head: bool) -> None:
        self._worker = worker
        self._model: Module = worker.model_runner.get_model()
        self._reads_head = reads_head
        self._plan: PlannedSync | None = None
        self._plans: dict[Layout, PlannedSync | None] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._next_check = 0

    @property
    def layers(self) -> list[Layer]:
        """Of the plan; none without one."""
        return self._plan.layers if self._plan is not None else []

    def load(self, weights: Weights) -> Loaded:
        """Replace the weights, and look at some of them.

        Args:
            weights: of the policy, by their checkpoint names.

        Raises:
            ValueError: if the policy lacks a parameter that the engine has.
            StaleWeights: if the engine holds something else afterwards.
        """
        shapes = {name: weight.shape for name, weight in weights.items()}
        if shapes != self._shapes:
            self._shapes, self._plan, self._plans = shapes, None, {}
        layout = layout_of(weights)
        plan = self._plans.get(layout)
        if plan is not None:
            with span("copy weights"):
                plan.load(weights)
        else:
            with span("reload weights"):
                reload_policy_weights(self._worker, self._whole(weights))
            if layout not in self._plans:
                with span("prove the plan"):
                    plan = self._plans[layout] = self._proven_plan(weights)
        self._plan = plan
        if self._plan is not None:
            with span("check weights"):
                self._next_check = self._plan.check(weights, self._next_check, CHECKED_LAYERS)
        return Loaded(sum(map(num_bytes_of, weights.values())), self._plan is not None)

    def check(self, weights: Weights) -> None:
        """Compare everything that the engine holds with the policy.

        Raises:
            StaleWeights: names the first parameter that differs.
        """
        assert self._plan is not None, "the engine asks only where there are layers"
        self._plan.check(weights, 0, None)

    def _whole(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter whole, one at a time; for vLLM's reload, which takes them as they come."""
        for name, weight in weights.items():
            beat()
            yield name, whole_weight(weight, weight.dtype)

    def _proven_plan(self, weights: Weights) -> PlannedSync | None:
        """The plan, if every rank has one that is right: a reload of a sharded policy takes all of them."""
        plan, reason = self._plan, None
        with set_current_vllm_config(self._worker.vllm_config):
            try:
                if plan is None:
                    plan = PlannedSync(make_plan(self._model, self._shapes), self._model, self._reads_head)
                else:  # the same parameters in another layout; the reload has packed everything again
                    plan.drop_packed_copies()
            except NoPlan as error:
                reason = str(error)
            reason = first_of_ranks(reason)
            if reason is None:
                assert plan is not None
                reason = first_of_ranks(disproof(plan, weights))
            if reason is None:
                return plan
            reload_policy_weights(self._worker, self._whole(weights))  # whatever a failed proof has left there
        warnings.warn(f"weights are synced through vLLM's reload, which is slower: {reason}", stacklevel=2)
        return None


def num_bytes_of(weight: Weight) -> int:
    """That are read of it."""
    return weight.num_bytes if isinstance(weight, LoraWeight) else weight.numel() * weight.element_size()


def first_of_ranks(reason: str | None) -> str | None:
    """The reason of the first rank of the job that has one."""
    return next((each for each in gathered(reason, get_world_group().cpu_group) if each is not None), None)


class Negated(Mapping[str, Weight]):
    """Weights of the other sign, made when asked for."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Weight:
        return -self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def disproof(plan: PlannedSync, weights: Weights) -> str | None:
    """Why the plan is wrong: it does not lead from other weights back to what a full reload of these has just made.

    Or it does not reach all of a layer: what it leaves alone keeps its sign when all others change theirs.
    """
    reloaded, expected = fingerprint(plan.layers), fingerprint(plan.layers, -1)
    plan.load(Negated(weights))
    negated = fingerprint(plan.layers, 1)
    plan.load(weights)
    loaded = fingerprint(plan.layers)
    for layer, before, after, changed, found in zip(plan.layers, reloaded, loaded, expected, negated, strict=True):
        name = ", ".join(dict.fromkeys(copy.source for copy in layer.copies)) or type(layer.module).__name__
        if after != before:
            return f"{name} is not what a full reload makes of it"
        if found != changed:
            return f"{name} is not reached by the plan"
    return None


@torch.inference_mode()
def fingerprint(layers: Sequence[Layer], sign: int = 0) -> list[int]:
    """A checksum of what each layer holds; of a packed one, of what it makes of some rows.

    Args:
        sign: 0 for the bits as they are; 1 or -1 for the numbers times that, where both zeros are the same.
    """
    return [_fingerprint(layer, sign) for layer in layers]


def _fingerprint(layer: Layer, sign: int) -> int:
    beat()
    found = 0
    for target, shape in layer.shapes.items():
        parameter = getattr(layer.module, target)
        held = parameter.data if parameter.shape == shape else _products(layer.module, shape, parameter.dtype)
        held = held * sign + 0.0 if sign else held
        if held.numel():
            found = zlib.crc32(held.contiguous().view(torch.uint8).cpu().numpy().data, found)
    return found


def _products(module: Any, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(PROBES, shape[-1], generator=torch.Generator().manual_seed(0)).to(dtype)
    return module.quant_method.apply(module, rows)
