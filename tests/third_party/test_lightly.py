"""lightly: its own LightningModules, and self-supervised modules as in its examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.helpers.modules import Trained
from tests.third_party.outcomes import Outcome
from tests.third_party.trained import (
    Case,
    check_outcome,
    loader,
    rows,
    sparse_fit,
)

lightly_loss = pytest.importorskip("lightly.loss")
pytorch_lightning = pytest.importorskip("pytorch_lightning")
from lightly.models import utils  # noqa: E402
from lightly.models.modules import heads  # noqa: E402
from lightly.utils.benchmarking import LinearClassifier  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


class TwoViews(Trained):
    """SimCLR, Barlow Twins and VICReg in lightly's examples: a backbone, a head, a loss of two views."""

    lr = 0.01

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projection_head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        self.criterion = criterion

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch[0]
        return self.criterion(self.forward(x0), self.forward(x1))


class SimSiam(TwoViews):
    def __init__(self) -> None:
        super().__init__(lightly_loss.NegativeCosineSimilarity())
        self.prediction_head = heads.SimSiamPredictionHead(16, 8, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch[0]
        z0, z1 = self.forward(x0), self.forward(x1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        return 0.5 * (self.criterion(z0.detach(), p1) + self.criterion(z1.detach(), p0))


class MoCo(TwoViews):
    """lightly/examples/pytorch_lightning/moco.py."""

    def __init__(self, memory: int = 128) -> None:
        super().__init__(lightly_loss.NTXentLoss(memory_bank_size=(memory, 16)))
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone_momentum)
        utils.deactivate_requires_grad(self.projection_head_momentum)

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x)).detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        x_query, x_key = batch[0]
        return self.criterion(self.forward(x_query), self.forward_momentum(x_key))


class MaskedAutoencoder(TwoViews):
    """The loss of lightly's masked autoencoder: the patches that were masked, (B, masked, pixels)."""

    def __init__(self) -> None:
        super().__init__(nn.MSELoss())
        self.decoder = nn.Linear(16, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0][0]
        patches = x.flatten(1).unflatten(1, (8, 8))
        _, idx_mask = utils.random_token_mask(size=(len(x), 8), mask_ratio=0.5, device=x.device)
        predicted = self.decoder(self.forward(x))[:, None].expand(-1, 8, -1)
        return self.criterion(utils.get_at_index(predicted, idx_mask), utils.get_at_index(patches, idx_mask))


def views() -> Any:
    x = torch.rand(256, 1, 8, 8)

    def collate(rows: list[Any]) -> Any:
        stacked = torch.stack([row[0] for row in rows])
        names = [f"{int(row[1])}.png" for row in rows]
        return [stacked, stacked.flip(3) + 0.01], torch.stack([row[1] for row in rows]), names

    return loader(TensorDataset(x, torch.arange(256)), collate_fn=collate)


def labelled() -> Any:
    return loader(TensorDataset(torch.rand(256, 1, 8, 8), torch.randint(0, 10, (256,))))


CASES = {
    "LinearClassifier": Case(
        lambda: LinearClassifier(backbone(), batch_size_per_device=32, feature_dim=32, num_classes=10),
        labelled,
        trainer=pytorch_lightning.Trainer,
    ),
    "SimCLR, NTXentLoss": Case(lambda: TwoViews(lightly_loss.NTXentLoss()), views),
    "BarlowTwinsLoss": Case(lambda: TwoViews(lightly_loss.BarlowTwinsLoss()), views),
    "VICRegLoss": Case(lambda: TwoViews(lightly_loss.VICRegLoss()), views),
    "DCLLoss": Case(lambda: TwoViews(lightly_loss.DCLLoss()), views),
    "SimSiam": Case(SimSiam, views),
    "MoCo, memory bank": Case(MoCo, views),
    "MAE": Case(MaskedAutoencoder, views),
}


@rows("lightly")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)


class ExplicitSimSiam(SimSiam):
    """1 - cos, not -cos: a loss is its own significance here, and negative significance counts as 0."""

    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch[0]
        z0, z1 = self.forward(x0), self.forward(x1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        return 1 - 0.5 * (F.cosine_similarity(z0.detach(), p1) + F.cosine_similarity(z1.detach(), p0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch, batch_idx).mean()


class NegativeSimSiam(ExplicitSimSiam):
    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return super().per_sample_loss(batch, batch_idx) - 1


CASES["SimSiam, per_sample_loss -cos"] = Case(NegativeSimSiam, views)


def test_a_pytorch_lightning_module_needs_its_own_trainer() -> None:
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        sparse_fit(replace(CASES["LinearClassifier"], trainer=pl.Trainer), "partial")
