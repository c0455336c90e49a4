"""The original's package in the regime map: what it is given, and how its work is counted, with a stand-in for it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


class StandIn:
    """A trainer with the interface of the package's, which trains on nothing."""

    def __init__(self, model: Any, train_loader: Any, val_loader: Any, config: Any) -> None:
        self.model = model
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.config = config
        self.history: dict[str, list[float]] = {"val_acc": [], "energy_savings": [], "activation_rates": []}

    def evaluate(self) -> float:
        assert {images.dtype for images, _ in self.val_loader} == {torch.float32}
        return 50.0

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            sizes = [len(labels) for images, labels in self.train_loader if images.is_floating_point()]
            assert sizes == [32] * len(self.train_loader)
            sys.stdout.write("a progress bar")
            self.history["val_acc"].append(self.evaluate())
            self.history["energy_savings"].append(68.0)
            self.history["activation_rates"].append(self.config.target_activation_rate)


def test_its_own_trainer_runs_and_its_work_is_two_forwards_and_a_backward(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = ModuleType("adaptive_sparse_training")
    package.__dict__.update(AdaptiveSparseTrainer=StandIn, ASTConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "adaptive_sparse_training", package)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runs = importlib.import_module("regime_run")
    regime = runs.Regime(data="digits", images=100, width=2, epochs=2, batch_size=32)
    run = runs.Run(regime, "original", (("rate", 0.3),))
    record = importlib.import_module("regime_train").train(run, root="", records=tmp_path, precision="32-true")
    assert record["accuracy"] == 0.5
    assert record["rate_by_epoch"] == [0.3, 0.3]
    assert record["claimed_energy_savings_percent"] == 68
    assert (record["samples_forwarded"], record["samples_backwarded"]) == (2 * 192, 192)
    assert 2 < record["work_epochs"] < 3
    assert record["joules"] is None
    assert "progress" not in capsys.readouterr().out
