"""A run that kills itself: ``python -m tests.callbacks.killed_run FOLDER STEP``. It resumes from the last checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ast import TwoStageScheduler
from tests.callbacks.pruning import Cycle, Indexed, fresh, loader, pruned
from tests.conftest import quiet_trainer, weights


class KillAt(pl.Callback):
    """SIGKILL in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, kill_at: int) -> None:
    """Ten epochs with dropout, BatchNorm, momentum, noise in the data and a one-cycle schedule."""
    module = fresh(Cycle)
    torch.manual_seed(11)
    checkpoints = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=1)
    trainer = quiet_trainer(
        max_epochs=10,
        enable_checkpointing=True,
        callbacks=[pruned(), TwoStageScheduler(warmup_epochs=2, cooldown_epochs=2), checkpoints, KillAt(kill_at)],
    )
    last = folder / "last.ckpt"
    trainer.fit(module, loader(shuffle=True, dataset=Indexed(noise=0.1)), ckpt_path=last if last.exists() else None)
    torch.save(weights(module), folder / "weights.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run(Path(sys.argv[1]), int(sys.argv[2]))
