"""Mode ``subset`` with steps that do not divide by the samples that they see: sums, and means over a fixed number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ast import PIController, SparseSelectionCallback
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import fit, gloo, quiet_trainer, weights

SIZE = 64
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "by a fixed number": lambda losses: losses.sum() / SIZE,
    "dot": lambda losses: losses @ torch.full_like(losses, 1 / SIZE),
    "half of the mean": lambda losses: 0.5 * losses.mean(),
    "root of the mean": lambda losses: losses.mean().sqrt(),
}


class Reduced(PlainNet):
    """Reduces its losses by hand."""

    def __init__(self, kind: str, *, manual: bool = False, dropout: float = 0.0) -> None:
        super().__init__(dropout=dropout, batchnorm=False)
        self.reduce = REDUCE[kind]
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.reduce(F.cross_entropy(self(batch[0]), batch[1], reduction="none"))
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None


def first_step(module: PlainNet, digits: Digits, **options: Any) -> tuple[list[Tensor], SparseSelectionCallback]:
    """The gradient of the first step, and the callback."""
    gradients: list[Tensor] = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if not gradients:
                gradients.extend(p.grad.clone() for p in pl_module.parameters())

    callback = SparseSelectionCallback(**{"mode": "subset", "target_activation_rate": 0.3, **options})
    fit(module, loader(digits, batch_size=SIZE), callback, Spy(), max_steps=1)
    return gradients, callback


def by_hand(reference: Reduced, digits: Digits, callback: SparseSelectionCallback) -> tuple[Tensor, ...]:
    """The user's loss of the whole batch, in which the selected samples stand for all."""
    kept = callback.last_selection
    w = torch.ones(len(kept.indices)) if kept.weights is None else kept.weights
    losses = F.cross_entropy(reference(digits[0][:SIZE]), digits[1][:SIZE], reduction="none")
    factors = torch.zeros(SIZE).index_add(0, kept.indices, w * SIZE / w.sum())
    return torch.autograd.grad(reference.reduce(factors * losses), list(reference.parameters()))


@pytest.mark.parametrize("weighting", ["none", "sqrt"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("kind", [kind for kind in REDUCE if kind != "root of the mean"])
def test_the_selected_samples_stand_for_the_batch(digits: Digits, kind: str, manual: bool, weighting: str) -> None:
    module, reference = (fresh(Reduced, kind=kind, manual=manual) for _ in range(2))
    gradients, callback = first_step(module, digits, weighting=weighting)
    for got, want in zip(gradients, by_hand(reference, digits, callback), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_function_of_the_mean_is_the_users_own_on_the_selected_samples(digits: Digits) -> None:
    module, reference = (fresh(Reduced, kind="root of the mean") for _ in range(2))
    gradients, callback = first_step(module, digits, gate="topk")
    kept = callback.last_selection.indices
    loss = F.cross_entropy(reference(digits[0][kept]), digits[1][kept]).sqrt()
    for got, want in zip(gradients, torch.autograd.grad(loss, list(reference.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mean", "sum"])
@pytest.mark.parametrize("significance", ["gradient", "loss"])
def test_dropout_does_not_hide_it(digits: Digits, kind: str, significance: str) -> None:
    """Scoring has no dropout, so the gradients of the two passes are similar at best."""
    module = fresh(Reduced, kind=kind, dropout=0.5)
    gradients, callback = first_step(module, digits, significance=significance)
    wanted = by_hand(fresh(Reduced, kind=kind), digits, callback)
    ratio = torch.cat([g.flatten() for g in gradients]).norm() / torch.cat([w.flatten() for w in wanted]).norm()
    assert 0.5 < float(ratio) < 1.8, "a missed or a needless factor would be 3.3"


@pytest.mark.filterwarnings("ignore:lightning-ast. mode='subset' at an activation rate of 95%")
def test_nearly_whole_batches_decide_nothing(digits: Digits) -> None:
    """A mean and a sum over 95 % of a batch are alike: a later, smaller selection tells them apart."""
    module = fresh(Reduced, kind="sum", dropout=0.5)
    callback = SparseSelectionCallback(mode="subset", gate="topk", target_activation_rate=0.95)
    fit(module, loader(digits, batch_size=SIZE), callback, max_steps=3)
    assert callback.ledger.selected == 3 * round(0.95 * SIZE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_ranks_that_sum(digits: Digits, tmp_path: Path) -> None:
    module, reference = (fresh(Reduced, kind="sum") for _ in range(2))
    cut = F.cross_entropy(reference(digits[0]), digits[1], reduction="none").median().item()
    fixed = PIController(preset="original", kp=0.0, ki=0.0, initial_threshold=SIZE * cut)
    callback = SparseSelectionCallback(mode="subset", gate="threshold", significance="loss", controller=fixed)

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.batch = batch

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.gradients = [p.grad.clone() for p in pl_module.parameters()]

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found = (self.batch, self.gradients, weights(pl_module))
            torch.save(found, tmp_path / f"{trainer.global_rank}.pt")

    trainer = quiet_trainer(devices=2, strategy=gloo(), callbacks=[callback, Record()], max_steps=1)
    trainer.fit(module, loader(digits, batch_size=SIZE))
    (first, gradients, _), (second, _, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x, y = (torch.cat([first[part], second[part]]) for part in (0, 1))
    losses = F.cross_entropy(reference(x), y, reduction="none")
    wanted = losses[losses > cut].mean() * SIZE  # DDP averages the sums of the ranks
    for got, want in zip(gradients, torch.autograd.grad(wanted, list(reference.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
