"""Mode ``subset`` with steps of several backwards: the first loss that depends on the batch is the one to score."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback
from tests.helpers.training import fit

SIZE = 8


class Adversaries(pl.LightningModule):
    """A GAN whose generator, which sees nothing of the batch, is trained first or last."""

    def __init__(self, *, generator_first: bool, schedulers: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.generator_first = generator_first
        self.with_schedulers = schedulers
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        self.seen.append(len(x))
        makers, critics = self.optimizers()

        def generator() -> Tensor:
            return F.softplus(-self.critic(self.generator(torch.randn(len(x), 3)))).mean()

        def critic() -> Tensor:
            drawn = self.generator(torch.randn(len(x), 3)).detach()
            return F.softplus(-self.critic(x)).mean() + F.softplus(self.critic(drawn)).mean()

        turns = [(generator, makers), (critic, critics)]
        for loss, optimizer in turns if self.generator_first else reversed(turns):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        if self.with_schedulers:
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.critic)]
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
        return (optimizers, schedulers) if self.with_schedulers else optimizers


def data() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(6 * SIZE, 4)), batch_size=SIZE)


@pytest.mark.parametrize("generator_first", [False, True], ids=["critic first", "generator first"])
def test_a_gan_is_scored_by_its_critic(generator_first: bool) -> None:
    module = Adversaries(generator_first=generator_first, schedulers=True)
    callback = SparseSelectionCallback(mode="subset", gate="topk", target_activation_rate=0.5, count_flops=False)
    trainer = fit(module, data(), callback, max_epochs=2)
    assert module.seen[-2:] == [SIZE, SIZE // 2], "a scoring pass, then the selected samples"
    assert callback.ledger.selected == callback.ledger.offered // 2
    assert trainer.global_step == 2 * 12, "a scoring pass steps no optimizer"
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == [pytest.approx(0.01 * 0.5**12)] * 2, "nor a scheduler"
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(state["step"] == 12 for optimizer in trainer.optimizers for state in optimizer.state.values())


@pytest.mark.parametrize("generator_first", [False, True], ids=["critic first", "generator first"])
def test_the_critics_gradient_is_what_selects(generator_first: bool) -> None:
    module = Adversaries(generator_first=generator_first)
    callback = SparseSelectionCallback(mode="subset", gate="topk", target_activation_rate=0.5, count_flops=False)
    batch = next(iter(data()))[0]
    significance = torch.sigmoid(-module.critic(batch)).flatten()  # the derivative of softplus
    fit(module, data(), callback, max_epochs=1, limit_train_batches=1)
    assert callback.last_selection.indices.tolist() == sorted(significance.topk(SIZE // 2).indices.tolist())


class Drawn(Adversaries):
    """A step in which nothing is computed from the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[0]
        optimizer.zero_grad()
        self.manual_backward(self.critic(self.generator(torch.randn(SIZE, 3))).mean())
        optimizer.step()


def test_a_step_without_the_samples_is_refused() -> None:
    module = Drawn(generator_first=True)
    callback = SparseSelectionCallback(mode="subset", target_activation_rate=0.5)
    with pytest.raises(RuntimeError, match="nothing in the graph of the loss was seen to depend on one of the 8"):
        fit(module, data(), callback, max_epochs=2)
