"""Settings that are mistyped, given twice or have no effect: each says so at once, and what is meant."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import (
    ConfigurationError,
    EnergyMonitor,
    PIController,
    SparseLossMixin,
    SparseSelectionCallback,
    SparseTrainingMonitor,
    TwoStageScheduler,
)
from tests.helpers.modules import OneLayer
from tests.helpers.training import quiet_trainer


class Net(OneLayer):
    names = ("val_loss", "val_acc", "other")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict(dict.fromkeys(self.names, 0.5))


class Scored(SparseLossMixin, Net):
    def significance(self, losses: Tensor, logits: Tensor, inputs: Any, targets: Tensor) -> Tensor:
        return losses


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 6), torch.arange(16) % 3), batch_size=8)


def fit(*callbacks: pl.Callback, module: pl.LightningModule | None = None, **options: Any) -> None:
    quiet_trainer(callbacks=list(callbacks), **options).fit(module or Net(), data(), data())


def warned(recwarn: pytest.WarningsRecorder) -> list[str]:
    return [str(w.message) for w in recwarn if "lightning-ast" in str(w.message)]


# ------------------------------------------------------------------ the accuracy of the monitor


def test_an_accuracy_that_is_not_logged(recwarn: pytest.WarningsRecorder) -> None:
    fit(SparseTrainingMonitor(accuracy="val_accuracy"), SparseSelectionCallback(), max_epochs=3)
    (message,) = warned(recwarn)
    assert "'val_accuracy' is not logged. Did you mean 'val_acc'? Logged are: 'val_acc', " in message
    for name in ("val_loss", "loss", "other"):
        assert repr(name) in message
    assert "ast/" not in message, "names of our own cannot be an accuracy"


def test_nothing_like_it_is_logged(recwarn: pytest.WarningsRecorder) -> None:
    class Silent(Net):
        names = ()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    fit(SparseTrainingMonitor(accuracy="top1"), SparseSelectionCallback(), module=Silent())
    (message,) = warned(recwarn)
    assert message.endswith("'top1' is not logged. Logged are: no metrics.")


@pytest.mark.parametrize(
    ("monitor", "says"),
    [
        (SparseTrainingMonitor(accuracy=5), "accuracy: expected the name of a logged metric or None, got 5"),
        (SparseTrainingMonitor(accuracy=["val_acc"]), "accuracy: expected the name"),
        (EnergyMonitor(meters="nvml"), "meters: expected a list of EnergyMeter objects or None, got 'nvml'"),
        (EnergyMonitor(meters=[None]), "meters: expected a list"),
    ],
    ids=["number", "list", "text", "no meter"],
)
def test_a_monitors_settings(monitor: pl.Callback, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        fit(monitor)


def test_it_is_checked_behind_the_first_validation(recwarn: pytest.WarningsRecorder) -> None:
    fit(SparseTrainingMonitor(accuracy="acc"), max_epochs=1, check_val_every_n_epoch=2)
    assert not warned(recwarn)
    fit(SparseTrainingMonitor(accuracy="acc"), max_epochs=3, check_val_every_n_epoch=2)
    assert len(warned(recwarn)) == 1


@pytest.mark.parametrize("accuracy", ["val_acc", "loss", None])
def test_a_name_that_is_logged(accuracy: str | None, recwarn: pytest.WarningsRecorder) -> None:
    fit(SparseTrainingMonitor(accuracy=accuracy))
    assert not warned(recwarn)


# ------------------------------------------------------------------ hints


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_activation_rate": 40}, r"expected a rate in \(0, 1\], got 40. Did you mean 0.4\?"),
        ({"target_activation_rate": 12.5}, r"Did you mean 0.125\?"),
        ({"target_activation_rate": 100}, r"Did you mean 1\?"),
        ({"target_activation_rate": 101}, r"got 101.$"),
        ({"target_activation_rate": -40}, r"got -40.$"),
        ({"quarantine_limit": 5}, r"got 5. Did you mean 0.05\?"),
        ({"min_selected": 4.0}, r"got 4.0. Did you mean 4\?"),
        ({"mode": "partail"}, r"got 'partail'. Did you mean 'partial'\?"),
        ({"gate": "Soft"}, r"got 'Soft'. Did you mean 'soft'\?"),
        ({"significance": "loss_entrpy"}, r"or a callable, got 'loss_entrpy'. Did you mean 'loss_entropy'\?"),
        ({"mode": "everything"}, r"got 'everything'.$"),
    ],
)
def test_hints(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        fit(SparseSelectionCallback(**settings))


def test_a_hint_for_the_scheduler() -> None:
    with pytest.raises(ConfigurationError, match=r"TwoStageScheduler\(target_activation_rate\).*mean 0.25\?"):
        fit(SparseSelectionCallback(), TwoStageScheduler(target_activation_rate=25))


# ------------------------------------------------------------------ settings without effect


@pytest.mark.parametrize(
    ("settings", "target", "says"),
    [
        ({"mode": "subset", "batchnorm": "exact"}, None, "batchnorm='exact' has no effect in mode='subset'"),
        ({"mode": "mask", "batchnorm": "exact"}, None, "batchnorm='exact' has no effect in mode='mask'"),
        ({"gate": "topk", "controller": PIController()}, None, "controller has no effect with gate='topk'"),
        ({"target_activation_rate": 0.5}, 0.25, "(0.5|=0.5.*) has no effect.*TwoStageScheduler counts, 0.25"),
    ],
)
def test_a_setting_without_effect(settings: dict[str, Any], target: float | None, says: str) -> None:
    schedule = TwoStageScheduler(warmup_epochs=0, target_activation_rate=target)
    with pytest.warns(UserWarning, match=says):
        fit(SparseSelectionCallback(**settings), schedule)


def test_the_modules_own_significance_counts() -> None:
    with pytest.warns(UserWarning, match="significance='loss' has no effect: the module's own"):
        fit(SparseSelectionCallback(significance="loss"), module=Scored())


@pytest.mark.parametrize("own", [0.4, 0.25])
def test_settings_with_effect(own: float, recwarn: pytest.WarningsRecorder) -> None:
    schedule = TwoStageScheduler(warmup_epochs=0, target_activation_rate=0.25)
    fit(SparseSelectionCallback(target_activation_rate=own, batchnorm="exact"), schedule)
    fit(SparseSelectionCallback(), module=Scored())
    assert not warned(recwarn)
