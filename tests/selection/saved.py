"""A short run with every callback that has state, for the tests of checkpoints.

``python -m tests.selection.saved FILE``, run with the code of a release, writes a checkpoint of each mode, from the midst
of an epoch. ``landed_checkpoints.pt.gz`` was made so with the first release, whose states have no version.
"""

from __future__ import annotations

import gzip
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import (
    EnergyMonitor,
    PIController,
    SparseSelectionCallback,
    SparseTrainingMonitor,
    TwoStageScheduler,
)
from tests.helpers.logs import Meter
from tests.helpers.modules import OneLayer

__all__ = ["BATCHES", "EPOCHS", "LANDED", "MODES", "SaveMidEpoch", "train"]

MODES = ("partial", "mask", "subset", "prune")
LANDED = Path(__file__).parent / "landed_checkpoints.pt.gz"
BATCH, BATCHES, EPOCHS = 4, 8, 4


class SaveMidEpoch(pl.Callback):
    """A checkpoint behind the second batch of the third epoch, the second sparse one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (2, 1):
            trainer.save_checkpoint(self.path)


def train(
    mode: Any,
    folder: Path,
    *extra: pl.Callback,
    ckpt_path: Path | None = None,
    original: bool = False,
    meter: Any = None,
) -> list[Any]:
    """Train four epochs, one of them dense, on 32 samples of which one is not finite.

    Returns:
        The callbacks that have state: of the selection, the monitor and the energy monitor.
    """
    torch.manual_seed(0)
    x = torch.randn(BATCH * BATCHES, 6)
    y = x[:, :3].argmax(1)
    x[3] = float("nan")
    controller = PIController(preset="original", initial_threshold=0.6) if original else None
    selection = SparseSelectionCallback(
        mode=mode, target_activation_rate=0.5, quarantine_limit=0.5, controller=controller, weighting="sqrt"
    )
    callbacks = [selection, SparseTrainingMonitor(images=0), EnergyMonitor(meters=[meter or Meter()])]
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[*callbacks, TwoStageScheduler(warmup_epochs=1), *extra],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    generator = torch.Generator().manual_seed(1)
    train_data = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True, generator=generator)
    trainer.fit(OneLayer(), train_data, DataLoader(TensorDataset(x[4:], y[4:]), batch_size=28), ckpt_path=ckpt_path)
    return callbacks


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    checkpoints = {}
    with tempfile.TemporaryDirectory() as temporary:
        for each in MODES:
            path = Path(temporary) / "run.ckpt"
            train(each, Path(temporary), SaveMidEpoch(path))
            checkpoints[each] = torch.load(path, weights_only=True)
    with gzip.open(sys.argv[1], "wb") as file:
        torch.save(checkpoints, file)
