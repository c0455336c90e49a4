"""Samples with NaN or infinity: never trained on, counted, named; the others train as if these were not there."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ast import SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import ExplicitNet, PlainNet, fresh
from tests.helpers.training import BATCH_MODES, StopAfter, assert_close_weights, assert_same_weights, fit, weights
from tests.selection.bad_samples import BAD, BadLoss, finite, marked, spoiled

pytestmark = pytest.mark.filterwarnings(
    "ignore:lightning-ast. NaN or infinity",
    "ignore:lightning-ast. the run ended after",  # within the warmup
)


def places(callback: SparseSelectionCallback) -> list[int]:
    """Positions in the data of an unshuffled loader of batches of 64."""
    return [64 * s.batch + s.position for s in callback.quarantined if s.position >= 0]


@pytest.mark.parametrize("explicit", [False, True], ids=["captured", "explicit"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_a_run_survives_bad_inputs(digits: Digits, mode: str, stage: str, value: float, explicit: bool) -> None:
    """With BatchNorm, which would carry one NaN to the whole batch and to its running statistics."""
    module = fresh(ExplicitNet if explicit else PlainNet)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.01)
    schedule = [TwoStageScheduler(warmup_epochs=1)] if stage == "warmup" else []
    trainer = fit(module, loader(spoiled(digits, value)), callback, *schedule, max_epochs=2, log_every_n_steps=1)
    assert finite(module)
    assert places(callback) == BAD * 2
    assert [s.epoch for s in callback.quarantined] == [0] * 3 + [1] * 3
    assert trainer.callback_metrics["ast/quarantined"] == 3
    if not explicit:
        assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize("mode", ["plain", *BATCH_MODES])
@pytest.mark.filterwarnings("ignore:lightning-ast")  # whose rows are whose cannot be told where all is NaN
def test_what_it_is_for(digits: Digits, mode: str) -> None:
    """The plain run, and one that does not look, are lost."""
    callbacks = [] if mode == "plain" else [SparseSelectionCallback(mode=mode, quarantine_limit=None)]
    module = fresh()
    fit(module, loader(spoiled(digits)), *callbacks)
    assert not finite(module)


@pytest.mark.parametrize("mode", [*BATCH_MODES, "prune"])
def test_a_dense_step_equals_one_without_the_bad_samples(digits: Digits, mode: str) -> None:
    """Warmup: the gradient is the mean over the finite samples of each batch, written out by hand."""
    module, reference = fresh(dropout=0.0, batchnorm=False), fresh(dropout=0.0, batchnorm=False)
    callback = SparseSelectionCallback(mode=mode)
    fit(module, loader(spoiled(digits)), callback, TwoStageScheduler(warmup_epochs=1), StopAfter(8), max_epochs=2)
    optimizer = reference.configure_optimizers()
    for step in range(8):
        rows = [i for i in range(64 * step, 64 * step + 64) if i not in BAD]
        optimizer.zero_grad()
        F.cross_entropy(reference(digits[0][rows]), digits[1][rows]).backward()
        optimizer.step()
    assert_close_weights(weights(module), weights(reference))
    assert callback.savings["samples"] == pytest.approx(3 / 512), "they are counted as not trained on"


@pytest.mark.filterwarnings("ignore:lightning-ast. mode='subset' at an activation rate of 90%")  # costs more than dense
@pytest.mark.parametrize("gate", ["soft", "topk", "threshold"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_bad_samples_are_never_selected(digits: Digits, mode: str, gate: str) -> None:
    chosen: set[int] = set()

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            chosen.update((64 * index + callback.last_selection.indices).tolist())

    callback = SparseSelectionCallback(mode=mode, gate=gate, target_activation_rate=0.9)
    fit(fresh(), loader(spoiled(digits)), callback, Spy(), max_epochs=4)
    assert not chosen & set(BAD)
    assert len(chosen) > 400


class BadExplicitLoss(SparseLossMixin, BadLoss):
    def per_sample_loss(self, batch: Any, batch_idx: int) -> Tensor:
        scores, y = self.losses(batch)
        return F.cross_entropy(scores, y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.per_sample_loss(batch, batch_idx).mean()
        self.log("train_loss", loss)
        return loss


@pytest.mark.parametrize("cls", [BadLoss, BadExplicitLoss])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("mode", [*BATCH_MODES, "prune"])
def test_a_run_survives_bad_losses(digits: Digits, mode: str, stage: str, cls: type[PlainNet]) -> None:
    module = fresh(cls)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.2)  # the first batch may be lost as a whole
    schedule = TwoStageScheduler(warmup_epochs=2 if stage == "warmup" else 0)
    trainer = fit(module, loader(marked(digits)), callback, schedule, StopAfter(16), max_epochs=3)
    assert finite(module)
    found = {s.index for s in callback.quarantined if s.index >= 0} if mode == "prune" else set(places(callback))
    assert found <= set(BAD)
    assert len(found) == 3 or stage == "sparse"
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize("mode", BATCH_MODES)
@pytest.mark.parametrize("weighting", ["none", "sqrt", "unbiased"])
def test_the_selection_s_gradient_is_that_without_them(digits: Digits, mode: str, weighting: str) -> None:
    module, reference = (fresh(BadLoss, dropout=0.0, batchnorm=False) for _ in range(2))
    callback = SparseSelectionCallback(mode=mode, weighting=weighting, target_activation_rate=0.5)
    kept, gradients = [], []

    class Spy(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            gradients.append([p.grad.clone() for p in pl_module.parameters()])

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            kept.append(callback.last_selection)

    fit(module, loader(marked(digits, [3, 9])), callback, Spy(), max_steps=1, log_every_n_steps=1)
    losses = F.cross_entropy(reference(digits[0][:64]), digits[1][:64], reduction="none")
    picked, w = losses[kept[0].indices], kept[0].weights
    loss = {
        "none": picked.mean,
        "sqrt": lambda: (w * picked).sum() / w.sum(),
        "unbiased": lambda: (w * picked).sum() / 62,
    }[weighting]()
    for got, want in zip(gradients[0], torch.autograd.grad(loss, list(reference.parameters()))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [*BATCH_MODES, "prune"])
def test_a_batch_without_a_finite_sample_moves_nothing(digits: Digits, mode: str) -> None:
    module, moved = fresh(), []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self.before = [p.detach().clone() for p in pl_module.parameters()]

        def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
            moved.append(any(bool(p.grad.any()) for p in pl_module.parameters()))

    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.5)
    where = list(range(128, 192))
    fit(module, loader(spoiled(digits, where=where)), callback, TwoStageScheduler(warmup_epochs=1), Spy(), max_epochs=2)
    assert finite(module)
    assert [i for i, m in enumerate(moved) if not m] == ([2] if mode == "prune" else [2, 10])


def test_finite_batches_are_passed_on_untouched(digits: Digits) -> None:
    seen = []

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    given = []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            given.append(batch)

    fit(fresh(Net), loader(digits), Spy(), SparseSelectionCallback(), max_steps=3)
    assert all(a is b for a, b in zip(given, seen))


def test_missing_labels_are_meant(digits: Digits) -> None:
    """NaN behind the first floating-point tensor is the user's own; NaN in it needs quarantine_limit=None."""

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            known = y.isfinite()
            scores = self(x)[:, 0]
            return F.mse_loss(scores.where(known, torch.zeros_like(scores)), y.nan_to_num(0.0))

    y = digits[1].float()
    y[::3] = math.nan
    module, callback = fresh(Net), SparseSelectionCallback()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lightning-ast")
        fit(module, loader((digits[0], y)), callback, max_steps=4)
    assert callback.quarantined == []
    assert finite(module)


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_looking_changes_nothing_where_all_is_finite(digits: Digits, mode: str) -> None:
    ends = []
    for limit in (None, 0.01):
        module = fresh()
        torch.manual_seed(1)
        fit(module, loader(digits), SparseSelectionCallback(mode=mode, quarantine_limit=limit), max_epochs=2)
        ends.append(weights(module))
    assert_same_weights(*ends)


class CountsRuns(BadLoss):
    """A NaN that only the loss shows; what the step does besides happens once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.runs: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.runs.append(batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("mode", ["mask", "partial"])
def test_a_dense_step_is_never_run_twice(digits: Digits, mode: str) -> None:
    """Also where only its loss shows what is not finite: the gradient tells which sample it is."""
    module = fresh(CountsRuns)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.2)
    where = [70, 200, 330]
    fit(module, loader(marked(digits, where)), callback, TwoStageScheduler(warmup_epochs=1), StopAfter(8), max_epochs=2)
    assert module.runs == list(range(8))
    assert [(s.batch, s.position) for s in callback.quarantined] == [(1, 6), (3, 8), (5, 10)]
    assert finite(module)
    assert callback.ledger.selected == 512 - 3


def test_a_manual_step_is_watched_in_the_warmup(digits: Digits) -> None:
    class Net(BadLoss):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    module, callback = fresh(Net), SparseSelectionCallback()
    fit(module, loader(marked(digits)), callback, TwoStageScheduler(warmup_epochs=1), StopAfter(8), max_epochs=2)
    assert finite(module)
    assert places(callback) == BAD


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_batchnorm_with_one_sample_left(digits: Digits, mode: str, left: int) -> None:
    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 10)
            )

    module = fresh(Net)
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.5)
    fit(module, loader(spoiled(digits, where=list(range(64, 128 - left)))), callback)
    assert finite(module)
    assert len(callback.quarantined) == 64 - left
