"""Faults of several parts of a set-up: all in one message, and what is none after all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ast import PIController, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import ConfigurationError
from tests.helpers.data import Digits, loader
from tests.helpers.modules import Manual, PlainNet, fresh
from tests.helpers.training import quiet_trainer, weights


def test_all_faults_in_one_message(digits: Digits) -> None:
    callback = SparseSelectionCallback(
        target_activation_rate=3, mode="subset", gate="topk", weighting="sqrt", seed="x", quarantine_limit=7
    )
    callbacks = [callback, Another(), TwoStageScheduler(warmup_epochs=-2), TwoStageScheduler()]
    with pytest.raises(ConfigurationError) as error:
        quiet_trainer(callbacks=callbacks).fit(fresh(Manual), loader(digits))
    named = ("rate", "weighting", "seed", "quarantine_limit", "one Sparse", "one TwoStage", "warmup_epochs")
    for name in named:
        assert sum(name in fault for fault in error.value.faults) >= 1, name
    assert len(error.value.faults) == len(named)
    assert all(fault in str(error.value) for fault in error.value.faults)


def test_a_schedule_alone(digits: Digits) -> None:
    with pytest.raises(ConfigurationError, match="has nothing to switch: add a SparseSelectionCallback"):
        quiet_trainer(callbacks=[TwoStageScheduler()]).fit(fresh(), loader(digits))


class Another(SparseSelectionCallback):
    pass


def test_two_selection_callbacks(digits: Digits) -> None:
    for callbacks in ([SparseSelectionCallback(), Another()], [Another(), SparseSelectionCallback()]):
        with pytest.raises(ConfigurationError, match="expected one SparseSelectionCallback, got 2"):
            quiet_trainer(callbacks=callbacks).fit(fresh(), loader(digits))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kp": -1.0}, "kp and ki must be >= 0"),
        ({"ema_alpha": 0.0}, r"ema_alpha must be in \(0, 1\]"),
        ({"threshold_bounds": (2.0, 1.0)}, "threshold_bounds must satisfy"),
        ({"integral_limit": 0.0}, "integral_limit must be > 0"),
        ({"feedforward_alpha": 2.0}, "feedforward_alpha must be None or in"),
        ({"initial_threshold": -1.0}, "initial_threshold must be > 0"),
        ({"kp": -1.0, "ema_alpha": 2.0}, "kp and ki must be >= 0.*; ema_alpha"),
    ],
)
def test_a_wrong_controller(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PIController(**options)


def test_methods_of_the_mixin_without_the_mixin(digits: Digits) -> None:
    class Net(PlainNet):
        def select_batch(self, batch: Any, indices: Tensor) -> Any:
            raise AssertionError("it is not called")

    with pytest.warns(UserWarning, match="Net defines select_batch, which .* calls on a SparseLossMixin alone"):
        quiet_trainer(callbacks=[SparseSelectionCallback(mode="subset")], max_steps=1).fit(fresh(Net), loader(digits))


class CompiledLoss(PlainNet):
    def __init__(self, compiled: bool = True) -> None:
        super().__init__(dropout=0.0, batchnorm=False)
        own = nn.CrossEntropyLoss()
        self.loss = torch.compile(own, backend="aot_eager") if compiled else own

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "mode", ["mask", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("subset", "partial"))]
)
def test_a_compiled_loss_is_seen(digits: Digits, mode: str) -> None:
    """Not a fault after all: torch's compiler traces through the capture."""
    ends = []
    for compiled in (False, True):
        module = fresh(CompiledLoss, compiled=compiled)
        callback = SparseSelectionCallback(mode=mode)
        quiet_trainer(callbacks=[callback], max_steps=3).fit(module, loader(digits))
        assert 0 < callback.ledger.selected < callback.ledger.offered
        ends.append(weights(module))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
