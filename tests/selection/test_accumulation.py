"""Micro-batches that keep different numbers of samples train as one large batch does."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core.gate import Selection
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import BATCH_MODES, fit


class Steps(pl.Callback):
    """Selections of the micro-batches, and the gradients that each optimizer step used."""

    def __init__(self, selection: SparseSelectionCallback) -> None:
        self.selection, self.kept, self.gradients = selection, [], []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, *_: Any) -> None:
        self.kept.append(self.selection.last_selection)


def losses_of(module: PlainNet, digits: Digits, batch: int, size: int) -> Tensor:
    x, y = (part[batch * size : (batch + 1) * size] for part in digits)
    return F.cross_entropy(module(x), y, reduction="none")


def large_batch(losses: list[Tensor], kept: list[Selection], weighting: str) -> Tensor:
    """The loss of all micro-batches as one batch: written out, independent of the package."""
    picked = torch.cat([row[k.indices] for row, k in zip(losses, kept)])
    if weighting == "none":
        return picked.mean()
    w = torch.cat([k.weights for k in kept]).to(picked)
    if weighting == "sqrt":
        return (w * picked).sum() / w.sum()
    return (w * picked).sum() / sum(len(row) for row in losses)


def test_clipping_comes_after_the_common_denominator(digits: Digits) -> None:
    norms = []

    class Net(PlainNet):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(*args, **kwargs)
            norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    callback = SparseSelectionCallback(mode="partial", target_activation_rate=0.2)
    fit(fresh(Net), loader(digits), callback, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_a_stage_begins_with_an_optimizer_step(digits: Digits, mode: str) -> None:
    """A warmup of 3.2 of 8 batches with windows of 2: the fourth batch belongs to the window of the third."""
    stages = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            stages.append(callback.stage)

    callback = SparseSelectionCallback(mode=mode)
    schedule = TwoStageScheduler(warmup_epochs=0.4)
    fit(fresh(), loader(digits), callback, schedule, Spy(), accumulate_grad_batches=2)
    assert stages == ["warmup"] * 4 + ["sparse"] * 4


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", BATCH_MODES)
@pytest.mark.parametrize("void", [0, 1])
@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
def test_a_micro_batch_without_a_finite_sample_counts_for_nothing(
    digits: Digits, mode: str, weighting: str, void: int
) -> None:
    spoiled = digits[0].clone()
    spoiled[64 * void : 64 * void + 64] = torch.nan
    module, reference = fresh(dropout=0.0, batchnorm=False), fresh(dropout=0.0, batchnorm=False)
    callback = SparseSelectionCallback(mode=mode, weighting=weighting, quarantine_limit=1.0)
    steps = Steps(callback)
    fit(module, loader((spoiled, digits[1])), callback, steps, accumulate_grad_batches=3, limit_train_batches=3)
    used = [batch for batch in range(3) if batch != void]
    losses = [losses_of(reference, digits, batch, 64) for batch in used]
    loss = large_batch(losses, [steps.kept[batch] for batch in used], weighting)
    want = dict(zip(steps.gradients[0], torch.autograd.grad(loss, list(reference.parameters()))))
    for name, gradient in steps.gradients[0].items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)


class Ignores(PlainNet):
    """Most labels of the first batch count for nothing, and those are what the score prefers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=9)


def test_a_first_micro_batch_with_a_denominator_of_zero_overflows_nothing(digits: Digits) -> None:
    y = digits[1].clamp_max(8).clone()
    y[:32] = 9
    callback = SparseSelectionCallback(
        mode="partial", gate="topk", significance=lambda losses, *_: (losses == 0).float(), target_activation_rate=0.4
    )
    steps = Steps(callback)
    fit(fresh(Ignores), loader((digits[0], y)), callback, steps, accumulate_grad_batches=2, limit_train_batches=2)
    assert (steps.kept[0].indices < 32).all(), "the first selection counts for nothing: the test can fail"
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) < 100 for g in steps.gradients[0].values())
