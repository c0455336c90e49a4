"""Runs on the device that these tests share."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import quiet_trainer, weights

__all__ = ["Mlp", "accelerator_of", "callbacks_of", "distance", "finite", "train"]


class Mlp(PlainNet):
    """Two layers without anything that draws or counts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        return F.cross_entropy(self(x), y)


def accelerator_of(device: str) -> str:
    """Lightning's name of the device."""
    return "gpu" if device == "cuda" else device


def callbacks_of(mode: str, *, warmup: int = 1, **options: Any) -> list[pl.Callback]:
    """The selection first; the plain run has none."""
    if mode == "plain":
        return []
    given = {"mode": mode, "target_activation_rate": 0.5, "gate": "topk", **options}
    return [SparseSelectionCallback(**given), *([TwoStageScheduler(warmup_epochs=warmup)] if warmup else [])]


def train(
    module: pl.LightningModule, digits: Digits, device: str, *callbacks: pl.Callback, **options: Any
) -> pl.Trainer:
    """Train on digits; return the trainer."""
    data = options.pop("data", None) or loader(digits)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = quiet_trainer(callbacks=list(callbacks), **{"accelerator": accelerator_of(device), **options})
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights(module).values())


def distance(one: nn.Module, other: nn.Module, cls: type[Any] = PlainNet, **options: Any) -> float:
    """How far two trained modules are apart, as a share of the way from where both began; infinite if none moved."""
    began = _flat(fresh(cls, **options))
    first = _flat(one)
    moved = (first - began).norm()
    return float((first - _flat(other)).norm() / moved) if moved > 0 else float("inf")


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().cpu().double().flatten() for p in module.parameters()])
