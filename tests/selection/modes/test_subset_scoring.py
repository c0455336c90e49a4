"""What the scoring pass of `subset` must run, and leave as it was: losses that are metrics, steps of two optimizers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric

from lightning_ast import SparseSelectionCallback
from tests.third_party.trained import QUIET

SIZE = 8

pytestmark = pytest.mark.filterwarnings("ignore:lightning-ast. mode=.* at an activation rate")


class Deviation(Metric):
    """A loss as a metric, as pytorch-forecasting's are."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, out: Tensor, target: Tensor) -> None:
        self.total = self.total + (out - target).abs().sum()
        self.count = self.count + target.numel()

    def compute(self) -> Tensor:
        return self.total / self.count


class Measured(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.criterion = Deviation()
        self.beside = MeanMetric()
        self.counts: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self.net(x), y)
        self.beside.update(loss.detach())
        self.counts.append((int(self.criterion.count), self.beside._update_count))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoPlayers(pl.LightningModule):
    """The first loss is of drawn numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(2, 3)
        self.discriminator = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 2))
        self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
        first.step()
        first.zero_grad()
        second.zero_grad()
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        self.manual_backward(loss)
        second.step()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]


def data() -> DataLoader[Any]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(4 * SIZE, 3), torch.randn(4 * SIZE, 1)), SIZE)


def fitted(module: pl.LightningModule) -> SparseSelectionCallback:
    callback = SparseSelectionCallback(mode="subset", target_activation_rate=0.5, gate="topk")
    pl.Trainer(**QUIET, max_epochs=1, callbacks=[callback]).fit(module, data())
    return callback


def test_a_loss_that_is_a_metric_is_scored_and_counts_the_selected_samples_alone() -> None:
    module = Measured()
    callback = fitted(module)
    real = module.counts[1::2]  # each step is run twice
    assert real == [(SIZE // 2 * (k + 1), k + 1) for k in range(4)]
    assert callback.activation_rate == 0.5


def test_the_first_loss_that_depends_on_the_batch_is_scored() -> None:
    torch.manual_seed(0)
    callback = fitted(TwoPlayers())
    assert callback.activation_rate == 0.5
    assert callback.ledger.selected == 2 * SIZE


class Summed(pl.LightningModule):
    """A sum over the samples, whose rows do not grow when there are fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.gradient = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().sum()

    def on_after_backward(self) -> None:
        self.gradient = self.net.weight.grad.clone()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_step_of_a_sum_is_as_long_as_that_of_mask() -> None:
    found = []
    for mode in ("mask", "subset"):
        torch.manual_seed(0)
        module = Summed()
        callback = SparseSelectionCallback(mode=mode, target_activation_rate=0.5, gate="topk")  # type: ignore[arg-type]
        pl.Trainer(**QUIET, max_steps=1, callbacks=[callback]).fit(module, data())
        found.append(module.gradient)
    torch.testing.assert_close(*found)
