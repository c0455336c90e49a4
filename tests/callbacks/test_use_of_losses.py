"""What a training step makes of its per-sample losses: in ``subset`` their mean alone, elsewhere nothing that picks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ast import LossCaptureError, SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from tests.callbacks.test_sparse_selection import fit, fresh
from tests.conftest import PlainNet, loader, weights

Digits = tuple[Tensor, Tensor]
Use = Callable[[Tensor, Tensor], Tensor]
STAGES = pytest.mark.parametrize("warm", [False, True], ids=["sparse", "warmup"])

OTHER: dict[str, Use] = {
    "sum": lambda losses, x: losses.sum(),
    "sum by a constant": lambda losses, x: losses.sum() / 64,
    "sum by the batch": lambda losses, x: (losses / 64).sum(),
    "dot": lambda losses, x: losses @ torch.full_like(losses, 1 / 64),
    "weighted mean": lambda losses, x: (losses * x.mean((1, 2, 3))).mean(),
    "weighted by the weights": lambda losses, x: (losses * x.mean((1, 2, 3))).sum() / x.mean((1, 2, 3)).sum(),
    "square": lambda losses, x: losses.square().mean(),
    "clipped": lambda losses, x: losses.clamp(max=2.3).mean(),
    "focal": lambda losses, x: ((1 - (-losses).exp().detach()) * losses).mean(),
    "smooth maximum": lambda losses, x: losses.logsumexp(0),
    "with the spread": lambda losses, x: losses.mean() + 0.1 * losses.std(),
    "half of it": lambda losses, x: losses[: len(losses) // 2].mean(),
    "joined": lambda losses, x: torch.cat([losses, losses]).mean(),
}
MEAN: dict[str, Use] = {
    "mean": lambda losses, x: losses.mean(),
    "over a dimension": lambda losses, x: losses.mean(dim=0),
    "of a column": lambda losses, x: losses[:, None].double().mean(),
    "scaled": lambda losses, x: 0.5 * losses.mean(),
    "scaled before": lambda losses, x: (losses / 2).mean(),
    "function of the mean": lambda losses, x: losses.mean().sqrt(),
    "above a baseline": lambda losses, x: (losses - 1).mean(),
}
PICKED: dict[str, Use] = {
    "largest": lambda losses, x: losses.topk(16).values.mean(),
    "maximum": lambda losses, x: losses.max(),
    "indexed": lambda losses, x: losses[torch.arange(len(x)) % 2 == 0].mean(),
    "weights of 0": lambda losses, x: (losses * (torch.arange(len(x)) % 2)).sum() / (len(x) // 2),
}


class Explicit(SparseLossMixin, PlainNet):
    """Uses its losses in some way; knows what it was given."""

    use: Use = staticmethod(Tensor.mean)

    def __init__(self, use: Use, *, manual: bool = False) -> None:
        super().__init__(dropout=0.0, batchnorm=False)
        self.use = use
        self.automatic_optimization = not manual

    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.use(self.per_sample_loss(batch, batch_idx), batch[0])
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None


def run(module: PlainNet, digits: Digits, mode: str, *, warm: bool = False, steps: int = 2) -> SparseSelectionCallback:
    callback = SparseSelectionCallback(mode=mode, gate="topk", significance="loss", target_activation_rate=0.5)
    schedule = [TwoStageScheduler(warmup_epochs=1)] if warm else []
    data = loader((digits[0][:128], digits[1][:128]))
    fit(module, data, callback, *schedule, max_epochs=2, max_steps=steps + 2 * warm)
    return callback


def refused(module: PlainNet, digits: Digits, mode: str, match: str, **options: Any) -> None:
    before = weights(module)
    with pytest.raises(LossCaptureError, match=match):
        run(module, digits, mode, **options)
    assert all(torch.equal(before[name], value) for name, value in weights(module).items()), "at the first batch"


@STAGES
@pytest.mark.parametrize("kind", OTHER)
def test_subset_refuses_what_is_not_the_mean(digits: Digits, kind: str, warm: bool) -> None:
    refused(fresh(Explicit, use=OTHER[kind]), digits, "subset", r"plain mean, .*\.mean\(\)", warm=warm)


@STAGES
@pytest.mark.parametrize("kind", ["sum by a constant", "weighted mean", "clipped"])
def test_subset_refuses_it_with_manual_optimization_too(digits: Digits, kind: str, warm: bool) -> None:
    refused(fresh(Explicit, use=OTHER[kind], manual=True), digits, "subset", "plain mean", warm=warm)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("kind", MEAN)
def test_subset_trains_on_functions_of_the_mean(digits: Digits, kind: str, manual: bool) -> None:
    """As a loop by hand does, which scores the whole batch and trains on the selected half."""
    module, reference = (fresh(Explicit, use=MEAN[kind], manual=manual) for _ in range(2))
    run(module, digits, "subset")
    optimizer = reference.configure_optimizers()
    for step in range(2):
        x, y = (part[64 * step : 64 * (step + 1)] for part in digits)
        losses = reference.per_sample_loss((x, y), 0)
        kept = losses.topk(32).indices.sort().values
        mean = losses[kept].mean()
        optimizer.zero_grad()  # the function's value is that of the whole batch, its gradient the selection's
        MEAN[kind]((mean + (losses.mean() - mean).detach()).expand(32), x[kept]).backward()
        optimizer.step()
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-5, atol=1e-6, msg=name)


@STAGES
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("mode", ["mask", "partial"])
@pytest.mark.parametrize("kind", PICKED)
def test_a_step_that_picks_is_refused(digits: Digits, mode: str, kind: str, manual: bool, warm: bool) -> None:
    module = fresh(Explicit, use=PICKED[kind], manual=manual)
    refused(module, digits, mode, "per-sample losses .*and divides by their number", warm=warm)


@pytest.mark.parametrize("mode", ["mask", "partial"])
@pytest.mark.parametrize("kind", ["sum", "sum by a constant", "sum by the batch", "dot", "weighted mean", "square"])
def test_mask_and_partial_do_what_the_step_says(digits: Digits, mode: str, kind: str) -> None:
    """The selected half stands for the whole: twice the gradient of its part of the loss, by hand."""
    module, reference = fresh(Explicit, use=OTHER[kind]), fresh(Explicit, use=OTHER[kind])
    run(module, digits, mode)
    optimizer = reference.configure_optimizers()
    for step in range(2):
        x, y = (part[64 * step : 64 * (step + 1)] for part in digits)
        losses = reference.per_sample_loss((x, y), 0)
        kept = torch.zeros(64, dtype=torch.bool).index_fill(0, losses.topk(32).indices, True)
        optimizer.zero_grad()
        (2 * OTHER[kind](losses.where(kept, losses.detach()), x)).backward()
        optimizer.step()
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-4, atol=1e-6, msg=name)


class CountsSamples(PlainNet):
    """A captured loss, multiplied by the number of samples or divided by it."""

    power = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) * (len(batch[0]) / 64) ** self.power


@pytest.mark.parametrize("power", [1, -1], ids=["multiplied", "divided"])
def test_subset_refuses_a_loss_that_counts_the_samples(digits: Digits, power: int) -> None:
    """A warmup's batch and a selection differ in size: known before the first sparse step is taken."""
    module = fresh(CountsSamples, dropout=0.0, batchnorm=False)
    module.power = power
    callback = SparseSelectionCallback(mode="subset")
    with pytest.raises(LossCaptureError, match="its loss by the number of samples"):
        fit(module, loader((digits[0][:128], digits[1][:128])), callback, TwoStageScheduler(), max_epochs=2)
    assert callback.ledger.offered == 128
    run(module, digits, "partial")


def test_subset_refuses_a_term_of_the_samples_beside_the_mean(digits: Digits) -> None:
    class Net(SparseLossMixin, PlainNet):
        def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.per_sample_loss(batch, batch_idx).mean() + self(batch[0]).square().mean()

    with pytest.raises(LossCaptureError, match="adds a term to its per-sample losses"):
        fit(fresh(Net), loader(digits), SparseSelectionCallback(mode="subset"), max_steps=2)
    fit(fresh(Net), loader(digits), SparseSelectionCallback(mode="mask"), max_steps=2)


@pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these")
def test_a_step_that_differentiates_before_its_loss(digits: Digits) -> None:
    """``subset`` scores without gradient: it names that, and its remedy works."""

    class Penalty(PlainNet):
        scored = contextlib.nullcontext

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with self.scored():
                x = batch[0].clone().requires_grad_()
                (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
            return F.cross_entropy(self(batch[0]) + slope.flatten(1).sum(1, keepdim=True), batch[1])

    class Remedied(Penalty):
        scored = torch.enable_grad

    with pytest.raises(LossCaptureError, match="scores the whole batch without gradient first"):
        fit(fresh(Penalty), loader(digits), SparseSelectionCallback(mode="subset"), max_steps=2)
    fit(fresh(Remedied), loader(digits), SparseSelectionCallback(mode="subset"), max_steps=2)
