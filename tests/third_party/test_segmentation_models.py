"""segmentation-models-pytorch in a module as in its README."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import Case, check_outcome, loader, rows

smp = pytest.importorskip("segmentation_models_pytorch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
]


class Segmenter(pl.LightningModule):
    def __init__(self, loss: nn.Module, classes: int) -> None:
        super().__init__()
        self.model = smp.Unet(
            "resnet18", encoder_weights=None, classes=classes, encoder_depth=3, decoder_channels=(16, 8, 8)
        )
        self.loss_fn = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, mask = batch
        return self.loss_fn(self.model(image), mask)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-4)


def multiclass() -> Any:
    images = torch.rand(64, 3, 32, 32)
    return loader(TensorDataset(images, (images.mean(1) * 3).long()), 16)


def binary() -> Any:
    images = torch.rand(64, 3, 32, 32)
    return loader(TensorDataset(images, (images.mean(1, keepdim=True) > 0.5).float()), 16)


CASES = {
    "Unet, CrossEntropyLoss": Case(lambda: Segmenter(nn.CrossEntropyLoss(), 3), multiclass),
    "Unet, DiceLoss": Case(lambda: Segmenter(smp.losses.DiceLoss(smp.losses.BINARY_MODE), 1), binary),
    "Unet, SoftBCEWithLogitsLoss": Case(lambda: Segmenter(smp.losses.SoftBCEWithLogitsLoss(), 1), binary),
    "Unet, FocalLoss": Case(lambda: Segmenter(smp.losses.FocalLoss(smp.losses.BINARY_MODE), 1), binary),
    "Unet, JaccardLoss": Case(lambda: Segmenter(smp.losses.JaccardLoss(smp.losses.BINARY_MODE), 1), binary),
    "Unet, SoftCrossEntropyLoss": Case(
        lambda: Segmenter(smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1), 3), multiclass
    ),
}


@rows("segmentation-models-pytorch")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
