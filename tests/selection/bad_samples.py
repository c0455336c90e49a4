"""Data and modules with samples that are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet
from tests.helpers.training import weights

__all__ = ["BAD", "BadLoss", "finite", "marked", "spoiled"]

BAD = [3, 70, 200]


def spoiled(digits: Digits, value: float = math.nan, where: list[int] = BAD) -> Digits:
    x = digits[0].clone()
    x[where, 0, 2, 2] = value
    return x, digits[1]


def finite(module: torch.nn.Module) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in weights(module).values())


class BadLoss(PlainNet):
    """Finite inputs; the scores of marked samples (first pixel 9) become NaN, as after a division by zero."""

    explicit = False

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        hurt = x[:, 0, 0, 0] == 9
        return self(x.where(x != 9, torch.zeros_like(x))) / (~hurt).float()[:, None] * 1.0, y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores, y = self.losses(batch)
        loss = F.cross_entropy(scores, y)
        self.log("train_loss", loss)
        return loss


def marked(digits: Digits, where: list[int] = BAD) -> Digits:
    x = digits[0].clone()
    x[where, 0, 0, 0] = 9
    return x, digits[1]
