"""Real runs on real digits, logged by Lightning's own loggers; and runs made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo import ImageData, SimpleCNN
from lightning_ast.report.series import Run, Series
from tests.helpers.training import quiet_trainer

EPOCHS = 4
PARTS = {"loading": 0.5, "scoring": 0.25, "forward_backward": 4.0, "validation": 1.0, "other": 0.25}


class Costs(Callback):
    """Writes costs and significance to the loggers at the last step of the epoch, as Lightning does."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        values = {f"energy/{name}_seconds": seconds * (epoch + 1) for name, seconds in PARTS.items()}
        values["energy/epoch_seconds"] = sum(values.values())
        values["energy/total_seconds"] = sum(PARTS.values()) * (epoch + 1) * (epoch + 2) / 2
        values["energy/gpu_joules"] = 100.0 * (epoch + 1)
        values["energy/total_joules"] = 50.0 * (epoch + 1) * (epoch + 2)
        values["energy/epoch_joules"] = 100.0 * (epoch + 1)
        if any(isinstance(c, SparseSelectionCallback) for c in trainer.callbacks):
            values |= {"ast/significance_p10": 0.1, "ast/significance_p50": 0.2, "ast/significance_p90": 0.5 + epoch}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)
            if isinstance(logger, TensorBoardLogger) and "ast/significance_p10" in values:
                significance = torch.linspace(0, 1 + epoch, 101)
                logger.experiment.add_histogram("ast/significance", significance, trainer.global_step)
                logger.experiment.add_histogram("ast/significance_selected", significance[60:], trainer.global_step)


def train(loggers: Any, *callbacks: Callback, epochs: int = EPOCHS, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    checkpoint = options.pop("ckpt_path", None)
    trainer = quiet_trainer(
        max_epochs=epochs, logger=loggers, log_every_n_steps=2, callbacks=list(callbacks), **options
    )
    data = ImageData("digits", batch_size=32, train_limit=320)
    trainer.fit(SimpleCNN(1, image_size=8, width=8), datamodule=data, ckpt_path=checkpoint)
    return trainer


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tb`` and ``csv``, each with ``dense``, ``partial`` and ``prune``, the last with a validation after the fit."""
    root = tmp_path_factory.mktemp("logs")
    schedule = {"warmup_epochs": 1, "cooldown_epochs": 1}
    for name in ("dense", "partial", "prune"):
        loggers = [TensorBoardLogger(root / "tb", name=name), CSVLogger(root / "csv", name=name)]
        callbacks: list[Callback] = [Costs()] if name != "dense" else []
        if name != "dense":
            callbacks += [
                SparseSelectionCallback(mode=name, target_activation_rate=0.4),
                TwoStageScheduler(**schedule),
            ]
        trainer = train(loggers, *callbacks)
        if name == "prune":
            trainer.validate(trainer.model, datamodule=trainer.datamodule, verbose=False)
    return root


def made(scalars: dict[str, Sequence[tuple[int, float]]], *, name: str = "made") -> Run:
    """A run from points ``(step, value)`` by tag."""
    return Run(name, Path("/logs") / name, "CSV", {tag: Series.of(points) for tag, points in scalars.items()})


def long_run(epochs: int, steps_an_epoch: int, *, name: str = "long") -> Run:
    """A sparse run of any length, without warmup or cooldown, some of its losses NaN."""
    rng = np.random.default_rng(0)
    steps = range(epochs * steps_an_epoch)
    ends = [(e + 1) * steps_an_epoch - 1 for e in range(epochs)]
    loss = np.where(rng.random(len(steps)) < 0.1, np.nan, 2 / (1 + np.arange(len(steps)) / len(steps)))
    return made(
        {
            "epoch": [(step, step // steps_an_epoch) for step in steps],
            "train_loss": list(zip(steps, loss.tolist(), strict=True)),
            "val_acc": [(end, 0.5 + 0.4 * i / epochs) for i, end in enumerate(ends)],
            "ast/stage": [(step, 1) for step in steps],
            "ast/activation_rate": [(step, float(rng.random())) for step in steps],
            "ast/activation_rate_ema": [(step, 0.4) for step in steps],
            "ast/target_activation_rate": [(step, 0.4) for step in steps],
            "ast/threshold": [(step, 10.0 / (step + 1)) for step in steps],
            "ast/savings_samples": [(step, 0.6) for step in steps],
            "ast/savings_flops": [(step, 0.4) for step in steps],
            "ast/savings_seconds": [(step, -0.1) for step in steps],
            "ast/savings_joules": [(step, 0.2) for step in steps],
            "energy/other_seconds": [(end, 3.0) for end in ends],
            "energy/epoch_seconds": [(end, 3.0) for end in ends],
            "energy/total_seconds": [(end, 3.0 * (i + 1)) for i, end in enumerate(ends)],
            "ast/significance_p50": [(end, 0.3) for end in ends],
        },
        name=name,
    )
