"""Advice for steps that differentiate by themselves, and for jagged tensors: measuring them must not make them fail."""

from __future__ import annotations

import pytest

from lightning_ast import SparseSelectionCallback
from lightning_ast.advice.measure import Measurement
from lightning_ast.advice.measured import Facts
from tests.helpers.training import quiet_trainer
from tests.selection.differentiating import MODULES, data, fresh

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),  # torch's forward AD
    pytest.mark.filterwarnings(
        "ignore:lightning-ast. in mode='partial' these backward operations"
    ),  # of jagged tensors
]


def facts(name: str, selection: SparseSelectionCallback) -> Facts:
    trainer = quiet_trainer(max_epochs=4, callbacks=[selection])
    return Measurement(trainer, fresh(name), data(), None, budget_seconds=0.5).facts()


@pytest.mark.parametrize("name", MODULES)
def test_every_mode_can_be_measured(name: str) -> None:
    step = facts(name, SparseSelectionCallback(gate="topk")).step
    assert step.dense.seconds > 0
    assert step.refused == {}
    assert None not in [found.share for found in step.dense_backwards], "FLOPs were counted"
    assert (step.memory is None) == (name == "Transforms"), "torch.func refuses hooks on saved tensors"


def test_flops_are_not_counted_where_the_callback_does_not() -> None:
    step = facts("Pinn", SparseSelectionCallback(gate="topk", count_flops=False)).step
    assert step.refused == {}
    assert {found.share for found in step.dense_backwards} == {None}
