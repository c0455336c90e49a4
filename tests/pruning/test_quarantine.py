"""Samples that are not finite in mode ``prune``: not loaded again before a dense epoch."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from tests.pruning.prune_by_hand import Indexed, Witness, pruned
from tests.pruning.prune_by_hand import fit as fit_pruned
from tests.selection.bad_samples import finite

pytestmark = pytest.mark.filterwarnings(
    "ignore:lightning-ast. NaN or infinity",
    "ignore:lightning-ast. the run ended after",  # within the warmup
)


def test_prune_does_not_load_them_again_before_a_dense_epoch() -> None:
    dataset = Indexed()
    dataset.x = dataset.x.clone()
    dataset.x[[5, 17, 40]] = math.nan
    module, callback = Witness(), pruned(quarantine_limit=0.02)
    fit_pruned(module, DataLoader(dataset, batch_size=32, shuffle=True), callback, max_epochs=5)
    epochs = module.epochs()
    loaded = {epoch: set(indices) & {5, 17, 40} for epoch, indices in epochs.items()}
    assert {s.index for s in callback.quarantined} == {5, 17, 40}
    assert [s.epoch for s in callback.quarantined] == [0] * 3 + [4] * 3, "dense epochs see them, pruned ones do not"
    assert [len(loaded[e]) for e in (1, 2, 3)] == [0, 0, 0]
    assert finite(module)


def test_prune_takes_a_mended_sample_back() -> None:
    dataset = Indexed()
    good, dataset.x = dataset.x, dataset.x.clone()
    dataset.x[5] = math.nan

    class Mend(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                dataset.x[5] = good[5]

    module, callback = Witness(), pruned(quarantine_limit=0.02)
    fit_pruned(module, DataLoader(dataset, batch_size=32), callback, Mend(), warmup=2)
    assert not callback.session.epochs.history.quarantined[5]
    assert len(callback.quarantined) == 1
