"""A run that is watched by the monitor, and by a spy in the user's own step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ast import (
    SparseSelectionCallback,
    SparseTrainingMonitor,
    TwoStageScheduler,
)
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer

__all__ = ["EPOCHS", "WARMUP", "Net", "Numbered", "Spy", "chain", "events", "run"]

EPOCHS, WARMUP = 5, 2


class Numbered(Dataset[tuple[Tensor, Tensor, int]]):
    """Digits as images, each with its own index: the truth that the noted indices are compared with."""

    def __init__(self, digits: Digits) -> None:
        self.images, self.labels = digits
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        self.asked.append(index)
        torch.rand(1)  # an augmentation
        return self.images[index], self.labels[index], index


class Net(PlainNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        return super().training_step((images, labels), batch_idx)


class Spy(pl.Callback):
    """Counts from outside what was offered and selected in sparse epochs, by the indices in the batches."""

    def __init__(self, selection: SparseSelectionCallback, size: int) -> None:
        self.selection = selection
        self.offered, self.selected = torch.zeros(size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
        self.classes: dict[int, Tensor] = {}
        self.scores: list[Tensor] = []
        self.thresholds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.by_class = torch.zeros(2, 10)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.selection.stage != "sparse":
            return
        labels, indices = batch[1], batch[2]
        kept = self.selection.last_selection.indices
        self.offered[indices] += 1
        self.selected[indices[kept]] += 1
        self.by_class[0] += labels.bincount(minlength=10)
        self.by_class[1] += labels[kept].bincount(minlength=10)
        self.classes[trainer.current_epoch] = self.by_class[1] / self.by_class[0]
        self.thresholds.append(self.selection.threshold)


def chain(mode: str, *extra: pl.Callback, **options: Any) -> tuple[SparseSelectionCallback, list[pl.Callback]]:
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=0.3, **options)
    return selection, [selection, TwoStageScheduler(warmup_epochs=WARMUP), *extra]


def run(
    digits: Digits, folder: Path, mode: str, *, dataset: Any = None, trainer_options: Any = None, **loading: Any
) -> tuple[SparseTrainingMonitor, Spy, pl.Trainer]:
    dataset = Numbered(digits) if dataset is None else dataset
    monitor = SparseTrainingMonitor(images=4)
    selection, callbacks = chain(mode, monitor)
    spy = Spy(selection, len(dataset))
    trainer = quiet_trainer(
        max_epochs=EPOCHS,
        callbacks=[*callbacks, spy],
        logger=TensorBoardLogger(str(folder), name=""),
        log_every_n_steps=1,
        **(trainer_options or {}),
    )
    torch.manual_seed(0)
    options = {"batch_size": 64, "shuffle": True, **loading}
    trainer.fit(Net(), DataLoader(dataset, **options), loader(digits, batch_size=512))
    return monitor, spy, trainer


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    accumulator = EventAccumulator(str(folder / "version_0"), size_guidance=everything)
    accumulator.Reload()
    return accumulator
