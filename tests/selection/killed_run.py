"""A run that kills its own process, and resumes from its last checkpoint when it is started again."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.training import quiet_trainer
from tests.pruning.prune_by_hand import Cycle, Indexed, fresh, loader

TIMED = ("seconds", "timed")


class KillAt(pl.Callback):
    """SIGKILL in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Lines(DummyLogger):
    """One JSON line for each logged step, written at once: what a killed process has logged is there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        kept = {name: value for name, value in metrics.items() if not any(t in name for t in TIMED)}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **kept}) + "\n")


class LoggedCycle(Cycle):
    """Logs its loss, and a validation loss."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def run(mode: str, folder: Path, kill_at: int, epochs: int = 10) -> None:
    """Ten epochs with dropout, BatchNorm, momentum, noise in the data and a one-cycle schedule."""
    module = fresh(LoggedCycle)
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    checkpoints = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=1)
    selection = SparseSelectionCallback(mode=mode)  # type: ignore[arg-type]
    dataset = Indexed(noise=0.1)
    data: Any = loader(shuffle=True, dataset=dataset)
    if mode != "prune":  # which restores the place in a plain loader
        data = StatefulDataLoader(dataset, batch_size=32, shuffle=True)
    trainer = quiet_trainer(
        max_epochs=epochs,
        enable_checkpointing=True,
        logger=Lines(folder / "log.jsonl"),
        log_every_n_steps=1,
        callbacks=[selection, TwoStageScheduler(warmup_epochs=2, cooldown_epochs=2), checkpoints, KillAt(kill_at)],
    )
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(folder / "end.ckpt")
    torch.save({"random": torch.get_rng_state(), "seen": module.epochs()}, folder / "end.pt")
