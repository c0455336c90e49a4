"""Validation and progress bar in mode ``prune``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    TQDMProgressBar,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from tests.pruning.prune_by_hand import (
    Indexed,
    epochs_by_hand,
    fit,
    fresh,
    loader,
    pruned,
)


class Counts(pl.Callback):
    """Batches of each epoch when it ends, and where validation ran."""

    def __init__(self) -> None:
        self.totals, self.validated, self.last = [], [], []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.totals.append(trainer.num_training_batches)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            self.last.append((trainer.current_epoch, batch_idx))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated.append((trainer.current_epoch, trainer.fit_loop.batch_idx))


VALIDATION = [
    ({}, [(0, 9), (1, 3), (2, 3), (3, 9)]),
    ({"val_check_interval": 0.5}, [(0, 4), (0, 9), (1, 1), (1, 3), (2, 1), (2, 3), (3, 4), (3, 9)]),
    (
        {"val_check_interval": 2},
        [(0, b) for b in (1, 3, 5, 7, 9)] + [(1, 1), (1, 3), (2, 1), (2, 3)] + [(3, b) for b in (1, 3, 5, 7, 9)],
    ),
    ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [(0, 6), (1, 3), (3, 2), (3, 9)]),
    ({"check_val_every_n_epoch": 2}, [(1, 3), (3, 9)]),
]


@pytest.mark.parametrize(("limits", "expected"), VALIDATION, ids=[str(limits) for limits, _ in VALIDATION])
@pytest.mark.parametrize("workers", [0, 1])
def test_validation_comes_when_it_is_due(limits: dict[str, Any], expected: Any, workers: int) -> None:
    counts, data = Counts(), loader(shuffle=True, num_workers=workers)
    fit(fresh(), data, counts, pruned(), val=DataLoader(TensorDataset(Indexed().x, Indexed().y), 150), **limits)
    assert counts.totals == [10, 4, 4, 10]
    assert counts.last == [(0, 9), (1, 3), (2, 3), (3, 9)]
    assert counts.validated == expected


@pytest.mark.parametrize("first", [True, False])
def test_progress_bar_totals(first: bool) -> None:
    totals: list[Any] = []

    class Bar(TQDMProgressBar):
        def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            super().on_train_epoch_start(trainer, *args)
            totals.append(self.train_progress_bar.total)

    callbacks = [Bar(), pruned()] if first else [pruned(), Bar()]
    fit(fresh(), loader(shuffle=True), *callbacks, enable_progress_bar=True)
    assert totals == [10, 4, 4, 10]


def test_validation_by_the_clock() -> None:
    module, val = fresh(), DataLoader(TensorDataset(Indexed().x, Indexed().y), 150)
    try:
        fit(module, loader(), pruned(), val=val, val_check_interval=timedelta(seconds=0.01))
    except (MisconfigurationException, TypeError):
        pytest.skip("this Lightning does not validate by the clock")
    assert module.epochs() == epochs_by_hand(module)
