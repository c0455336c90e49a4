"""Lightning's own demo modules."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import (
    Case,
    check_outcome,
    loader,
    rows,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
]


class NoDownload:
    """The text is made here: nothing to prepare."""

    def prepare_data(self) -> None:
        return None


class OfflineTransformer(NoDownload, LightningTransformer):
    pass


class OfflineLSTM(NoDownload, LightningLSTM):
    pass


def text() -> Any:
    tokens = torch.randint(0, 50, (256, 13))
    return loader(TensorDataset(tokens[:, :-1], tokens[:, 1:]))


CASES = {
    "BoringModel": Case(BoringModel, lambda: loader(RandomDataset(32, 512))),
    "ManualOptimBoringModel": Case(ManualOptimBoringModel, lambda: loader(RandomDataset(32, 4096))),
    "DemoModel": Case(DemoModel, lambda: loader(RandomDataset(32, 512))),
    "LightningTransformer": Case(lambda: OfflineTransformer(vocab_size=50), text),
    "LightningLSTM": Case(lambda: OfflineLSTM(vocab_size=50), text),
}


@rows("lightning")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)


class GAN(pl.LightningModule):
    """Lightning's tutorial "PyTorch Lightning Basic GAN Tutorial", with smaller networks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 32), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(32, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Sigmoid())

    def adversarial_loss(self, y_hat: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy(y_hat, y)

    def training_step(self, batch: Any) -> None:
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(batch.shape[0], 8).type_as(batch)
        valid = torch.ones(batch.size(0), 1).type_as(batch)
        self.toggle_optimizer(optimizer_g)
        g_loss = self.adversarial_loss(self.discriminator(self.generator(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)
        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(batch), valid)
        fake_loss = self.adversarial_loss(self.discriminator(self.generator(z).detach()), torch.zeros_like(valid))
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in parts], []


@rows("lightning tutorials")
def test_gan(row: Outcome, mode: str) -> None:
    check_outcome(Case(GAN, lambda: loader(RandomDataset(32, 512))), row, mode)
