"""Micro-batches that keep different numbers of samples train as one large batch does."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast import PIController, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core.gate import Selection
from lightning_ast.errors import ConfigurationError
from tests.helpers.data import Digits, loader
from tests.helpers.modules import ExplicitNet, Lbfgs, PlainNet, fresh
from tests.helpers.training import fit, weights


class Steps(pl.Callback):
    """Selections of the micro-batches, and the gradients that each optimizer step used."""

    def __init__(self, selection: SparseSelectionCallback) -> None:
        self.selection, self.kept, self.gradients, self.windows = selection, [], [], []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})
        self.windows.append(len(self.kept) + 1)

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


def assert_gradients(got: dict[str, Tensor], loss: Tensor, module: nn.Module) -> None:
    want = dict(zip(got, torch.autograd.grad(loss, list(module.parameters()))))
    error = torch.cat([(got[n] - want[n]).flatten() for n in got]).norm()
    assert error < 1e-6 * torch.cat([w.flatten() for w in want.values()]).norm()


@pytest.mark.parametrize("explicit", [False, True], ids=["captured", "explicit"])
@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
def test_three_micro_batches_equal_one_large_batch(digits: Digits, mode: str, weighting: str, explicit: bool) -> None:
    digits = digits[0].double(), digits[1]
    module, reference = (fresh(ExplicitNet, dropout=0.0, batchnorm=False).double() for _ in range(2))
    if not explicit:
        module = fresh(dropout=0.0, batchnorm=False).double()
    gate = {"gate": "soft"}
    if weighting == "none":  # a fixed threshold keeps what it keeps: very different numbers
        cut = F.cross_entropy(reference(digits[0]), digits[1], reduction="none").median().item()
        fixed = PIController(preset="original", kp=0.0, ki=0.0, initial_threshold=cut)
        gate = {"gate": "threshold", "significance": "loss", "controller": fixed}
    callback = SparseSelectionCallback(mode=mode, weighting=weighting, **gate)
    steps = Steps(callback)
    fit(module, loader(digits), callback, steps, accumulate_grad_batches=3, max_epochs=1, precision="64-true")

    assert steps.windows == [3, 6, 8], "the last window of the epoch is short"
    counts = [len(k.indices) for k in steps.kept[:3]]
    assert len(set(counts)) > 1 or weighting != "none", "different numbers: the test can fail"
    losses = [losses_of(reference, digits, batch, 64) for batch in range(3)]
    assert_gradients(steps.gradients[0], large_batch(losses, steps.kept[:3], weighting), reference)


def test_the_short_window_at_the_end_of_an_epoch_keeps_lightnings_share(digits: Digits) -> None:
    """Lightning divides by 3 although the last window holds 2: the sparse step is that share of the large batch."""
    digits = digits[0].double(), digits[1]
    module, reference = (fresh(dropout=0.0, batchnorm=False).double() for _ in range(2))
    callback = SparseSelectionCallback(mode="partial")
    steps = Steps(callback)
    before: list[Any] = []

    class Before(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                before.append(weights(pl_module))

    fit(module, loader(digits), callback, steps, Before(), accumulate_grad_batches=3, precision="64-true")
    reference.load_state_dict(before[0])
    losses = [losses_of(reference, digits, batch, 64) for batch in (6, 7)]
    assert_gradients(steps.gradients[2], 2 / 3 * large_batch(losses, steps.kept[6:], "sqrt"), reference)


def test_clipping_comes_after_the_common_denominator(digits: Digits) -> None:
    norms = []

    class Net(PlainNet):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(*args, **kwargs)
            norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

    callback = SparseSelectionCallback(mode="partial", target_activation_rate=0.2)
    fit(fresh(Net), loader(digits), callback, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
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


def test_lbfgs_with_accumulation_is_refused(digits: Digits) -> None:
    """Lightning adds up the gradients of all its evaluations of the last micro-batch."""
    module = fresh(Lbfgs)
    with pytest.raises(ConfigurationError, match=r"LBFGS.*accumulate_grad_batches=1"):
        fit(module, loader(digits), SparseSelectionCallback(), accumulate_grad_batches=3)
    assert module.seen == []


@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
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
