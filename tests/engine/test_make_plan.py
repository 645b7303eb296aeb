"""What fills what is read off a model's own loaders; one that cannot be read off is no plan, and no error."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

import rollout.backend.sync_plan as sync_plan
from rollout.backend.sync_plan import NoPlan, make_plan

SHAPES = {"up": torch.Size((6, 4)), "down": torch.Size((2, 4))}
ROWS = {"up": slice(0, 6), "down": slice(6, 8)}


class Fused(nn.Module):
    """Two parameters of a checkpoint in one of the engine's."""

    def __init__(self, check: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(32.0).view(8, 4), requires_grad=False)

        def loader(param: torch.Tensor, loaded: torch.Tensor, name: str) -> None:
            check(loaded)
            param.data[ROWS[name]].copy_(loaded)

        self.weight.weight_loader = loader


class Model(nn.Module):
    """With vLLM's way of loading weights."""

    def __init__(self, check: Callable[[torch.Tensor], None] = lambda loaded: None) -> None:
        super().__init__()
        self.fused = Fused(check)
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, loaded in weights:
            self.fused.weight.weight_loader(self.fused.weight, loaded, name)


def test_a_plan_and_a_beat_for_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[None] = []
    monkeypatch.setattr(sync_plan, "beat", lambda: beats.append(None))
    model = Model()
    (layer,) = make_plan(model, SHAPES)
    assert [(copy.source, copy.target_box[0]) for copy in layer.copies] == [*ROWS.items()]
    assert len(beats) == len(SHAPES)
    assert torch.equal(model.fused.weight, torch.arange(32.0).view(8, 4))


@pytest.mark.parametrize("kind", [AssertionError, TypeError, KeyError])
def test_a_loader_that_refuses_whole_numbers_gives_no_plan(kind: type[Exception]) -> None:
    def check(loaded: torch.Tensor) -> None:
        if not loaded.is_floating_point() and len(loaded) == 2:
            raise kind("dtype")

    model = Model(check)
    weight = model.fused.weight
    with pytest.raises(NoPlan, match=rf"down: {kind.__name__}\('dtype'\)"):
        make_plan(model, SHAPES)
    assert model.fused.weight is weight and torch.equal(weight, torch.arange(32.0).view(8, 4)), "as it was"


def test_a_plan_that_would_take_hours_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * 2 * 32  # parameters of the checkpoint, their dimensions, elements of the engine's
    monkeypatch.setattr(sync_plan, "MOST_STAND_INS", needed)
    make_plan(Model(), SHAPES)
    monkeypatch.setattr(sync_plan, "MOST_STAND_INS", needed - 1)
    with pytest.raises(NoPlan, match="down: the plan takes more than"):
        make_plan(Model(), SHAPES)
