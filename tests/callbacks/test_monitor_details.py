"""What a monitor shows beyond its usual line, and what it tells of metrics that are not there."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from lightning_ast import SparseTrainingMonitor
from lightning_ast.callbacks import ConfigurationError
from lightning_ast.demo import ImageData, SimpleCNN
from lightning_ast.monitoring.progress import epoch_details
from tests.helpers.training import quiet_trainer


def fit(monitor: SparseTrainingMonitor) -> None:
    pl.seed_everything(0, verbose=False)
    trainer = quiet_trainer(callbacks=[monitor], max_epochs=2, limit_train_batches=2)
    trainer.fit(SimpleCNN(1, image_size=8, width=4), datamodule=ImageData("digits", batch_size=32))


def test_metrics_and_time_are_in_the_line_and_the_convergence_in_the_summary(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit(SparseTrainingMonitor(metrics=["val_loss"], details=True))
    lines = capsys.readouterr().out.splitlines()
    assert all("| val_loss: 2." in line and "| Time: " in line for line in lines if line.startswith("Epoch"))
    assert "  convergence  90% of the best in epoch" in "\n".join(lines)


def test_the_usual_line_has_none_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    fit(SparseTrainingMonitor())
    shown = capsys.readouterr().out
    assert "Epoch 1/1" in shown
    assert not any(word in shown for word in ("Time:", "convergence", "val_loss"))


def test_a_metric_that_is_not_logged_is_told_once() -> None:
    with pytest.warns(UserWarning, match="shows less: 'val_los' is not logged. Did you mean 'val_loss'") as told:
        fit(SparseTrainingMonitor(metrics=["val_los", "ast/threshold"]))
    assert len([each for each in told if "shows less" in str(each.message)]) == 1


def test_an_accuracy_that_is_not_logged_is_told_whatever_its_name() -> None:
    with pytest.warns(UserWarning, match="shows less: 'ast/accuracy' is not logged"):
        fit(SparseTrainingMonitor(accuracy="ast/accuracy"))


@pytest.mark.parametrize("metrics", ["val_loss", [1]])
def test_metrics_must_be_a_list_of_names(metrics: object) -> None:
    with pytest.raises(ConfigurationError, match="metrics: expected a list of names of logged metrics"):
        fit(SparseTrainingMonitor(metrics=metrics))  # type: ignore[arg-type]


def test_what_is_not_known_is_left_out() -> None:
    assert epoch_details(["absent"], {}, seconds=None, device=torch.device("cpu")) == []


def test_the_line_has_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 3 * 2**29)
    device = torch.device("cuda", 1)
    assert epoch_details([], {}, seconds=75.0, device=device) == ["Time: 1m 15s", "GPU: 1.5 GiB"]
    assert asked == [device]
