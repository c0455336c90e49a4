"""A run from a configuration file, as ``lightning-ast fit`` makes it, in a script that changes a few settings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_ast.callbacks import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core.ledger import estimated_energy_savings
from lightning_ast.extras import needs
from lightning_ast.recipes.comparing import counting, work_share

__all__ = ["configured", "figures", "without_selection"]


def configured(path: str | Path, *arguments: str, seed: int) -> tuple[pl.Trainer, pl.LightningModule, Any]:
    """Make the trainer, the module and the data of a configuration file, ready for ``trainer.fit``.

    Args:
        path: The YAML file.
        arguments: Settings that replace those of the file, such as ``"--trainer.max_epochs=3"``.
        seed: The seed of the weights, the order of the samples and the gate.
    """
    with needs("cli", "jsonargparse"):
        from lightning.pytorch.cli import LightningCLI
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # the script has arguments too
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # Lightning 2.6's use of jsonargparse
        cli = LightningCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            run=False,
            args=["--config", str(path), f"--seed_everything={seed}", *arguments],
        )
    for callback in callbacks_of(cli.trainer):
        if isinstance(callback, SparseSelectionCallback):
            callback.seed = seed
    pl.seed_everything(seed, verbose=False)  # the order of the samples: the same for every network
    return cli.trainer, cli.model, cli.datamodule


def callbacks_of(trainer: pl.Trainer) -> list[Callback]:
    """Return the list of a trainer's callbacks, which may be changed before a fit."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def without_selection(trainer: pl.Trainer) -> None:
    """Make the run of a configuration the plain dense one, bitwise; its FLOPs are counted still."""
    callbacks = callbacks_of(trainer)
    callbacks[:] = [
        counting() if isinstance(each, SparseSelectionCallback) else each
        for each in callbacks
        if not isinstance(each, TwoStageScheduler)
    ]


def figures(trainer: pl.Trainer, *, length: float = 1.0) -> dict[str, float]:
    """Return what a finished run of image classification reached and cost, as shares in [0, 1].

    Args:
        trainer: The trainer of the run, with its ``SparseSelectionCallback``.
        length: The length of the run as a share of the dense run's.

    Returns:
        ``accuracy`` of the validation; ``activation``, the share of the samples trained on, of a full-length run;
        ``formula``, the "energy saved" that the original's formula makes of it; ``work``, the FLOPs.
    """
    selection = next(each for each in callbacks_of(trainer) if isinstance(each, SparseSelectionCallback))
    ledger = selection.ledger
    selected = round(ledger.selected * length)
    return {
        "accuracy": float(torch.as_tensor(trainer.callback_metrics["val_acc"])),
        "activation": round(selected / ledger.offered, 4),
        "formula": round(estimated_energy_savings(offered=ledger.offered, selected=selected), 4),
        "work": work_share(trainer, length=length),
    }
