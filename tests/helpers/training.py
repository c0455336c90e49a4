"""Trainers, what they save on their way, and the weights that they leave."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_ast import SparseSelectionCallback
from lightning_ast.core.execution import Mode

__all__ = [
    "BATCH_MODES",
    "MODES",
    "SaveAt",
    "StopAfter",
    "assert_close_weights",
    "assert_same_weights",
    "fit",
    "gloo",
    "half",
    "quiet_trainer",
    "weights",
]

MODES = get_args(Mode)
BATCH_MODES = tuple(mode for mode in MODES if mode != "prune")
"""Those that select from each batch."""


def quiet_trainer(**options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
    }
    return pl.Trainer(**{**defaults, **options})


def gloo() -> DDPStrategy:
    """Forked processes that talk through gloo; one that hangs fails after two minutes."""
    return DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=120))


def fit(module: pl.LightningModule, data: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, data)
    return trainer


def half(**options: Any) -> SparseSelectionCallback:
    """A deterministic selection: exactly the half with the largest loss."""
    return SparseSelectionCallback(
        **{"target_activation_rate": 0.5, "mode": "subset", "gate": "topk", "significance": "loss", **options}  # type: ignore[arg-type]
    )


class StopAfter(pl.Callback):
    """Ends a run, whose planned length is longer, after some optimizer steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


class SaveAt(pl.Callback):
    """One checkpoint at a given point of a run."""

    def __init__(self, path: Path, hook: str, epoch: int, batch: int | None = None) -> None:
        self.path, self.hook, self.epoch, self.batch = path, hook, epoch, batch

    def save(self, trainer: pl.Trainer, hook: str, batch: int | None = None) -> None:
        if (hook, trainer.current_epoch, batch) == (self.hook, self.epoch, self.batch):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "epoch end")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.save(trainer, "batch end", batch_idx)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.save(trainer, "batch start", batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation end", trainer.fit_loop.batch_idx)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_close_weights(
    left: dict[str, Tensor], right: dict[str, Tensor], *, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=rtol, atol=atol, msg=name)
