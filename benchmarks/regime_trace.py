"""What is noted while a run of the regime map trains: time, rates, coverage, wrong labels, accuracy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from regime_data import RegimeData
from regime_networks import ClassifierModule

from lightning_ast import SparseSelectionCallback
from lightning_ast.energy import EnergyMeter

__all__ = ["Stopwatch", "Trace", "validated_every"]


def validated_every(epochs: int) -> int:
    """Return the epochs between two validations: about ten in a run, the last one at its end."""
    most = max(1, epochs // 8)
    return max(every for every in range(1, most + 1) if epochs % every == 0)


class Stopwatch(Callback):
    """The wall time, the time on the CPU and the energy that training took, without validation.

    Args:
        meters: The counters of energy; without any, the joules stay unknown.

    Attributes:
        seconds: The wall time.
        cpu_seconds: The time that this process computed on a CPU.
    """

    def __init__(self, meters: Sequence[EnergyMeter] = ()) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._meters = meters
        self._joules = 0.0
        self._since: tuple[float, float, float] | None = None

    @property
    def joules(self) -> float | None:
        """Return the energy, or None where nothing counts it."""
        return self._joules if self._meters else None

    def start(self) -> None:
        """Begin, or go on."""
        joules = sum(meter.read_joules() for meter in self._meters)
        self._since = (time.perf_counter(), time.process_time(), joules)

    def stop(self) -> None:
        """Pause until it is started again."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since[0]
            self.cpu_seconds += time.process_time() - self._since[1]
            self._joules += sum(meter.read_joules() for meter in self._meters) - self._since[2]
            self._since = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for meter in self._meters:  # a CPU's counter comes round, and must be read now and then
            meter.read_joules()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop()


class Trace(Callback):
    """What happened in each epoch.

    Args:
        data: The data of the run.
        selection: The selection callback, or None.
    """

    def __init__(self, data: RegimeData, selection: SparseSelectionCallback | None) -> None:
        self._data = data
        self._selection = selection
        self._dense_samples = data.dense_batches * data.regime.batch_size
        self._trained = 0
        self._wrong = 0
        self._selected_before = 0
        self._coverages: list[float] = []
        self.accuracies: list[float] = []
        self.rates: list[float] = []
        self.coverages: list[float | None] = []
        self.wrong_shares: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        indices = batch[2].cpu()
        kept = None
        if self._selection is not None:
            if self._selection.mode != "prune":
                kept = self._selection.last_selection
            coverage = trainer.callback_metrics.get("ast/coverage")
            if coverage is not None and self._selection.stage == "sparse":
                self._coverages.append(float(coverage))
        if kept is not None:
            indices = indices[kept.indices.cpu()]
        self._trained += len(indices)
        self._wrong += int(self._data.training.wrong[indices % len(self._data.training.wrong)].sum())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = self._trained
        if self._selection is not None:
            trained = self._selection.ledger.selected - self._selected_before
            self._selected_before = self._selection.ledger.selected
        elif isinstance(pl_module, ClassifierModule):
            trained = pl_module.backwarded - self._selected_before
            self._selected_before = pl_module.backwarded
        self.rates.append(round(trained / self._dense_samples, 4))
        mean = sum(self._coverages) / len(self._coverages) if self._coverages else None
        self.coverages.append(None if mean is None else round(mean, 4))
        self.wrong_shares.append(round(self._wrong / max(1, self._trained), 4))
        self._trained = 0
        self._wrong = 0
        self._coverages = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.accuracies.append(round(float(trainer.callback_metrics["val_acc"]), 4))
