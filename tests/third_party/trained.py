"""Somebody else's LightningModule in each mode: what "it trains" means, checked the same way for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import SampleSelector, Selection
from lightning_ast.errors import BatchError, ConfigurationError, EntryError, LossCaptureError
from tests.helpers.training import assert_same_weights, weights
from tests.third_party.outcomes import OUTCOMES, Outcome

MODES = ("mask", "subset", "partial", "prune")
RATE = 0.5
REFUSALS = (EntryError, LossCaptureError, ConfigurationError, BatchError)
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


@dataclass(frozen=True)
class Case:
    """A module that somebody else wrote.

    Attributes:
        module: makes it, with the same weights each time.
        data: makes its training data (and validation data), the same each time.
        trainer: the Trainer it belongs to; packages that import ``pytorch_lightning`` need that one's.
        options: of the Trainer.
    """

    module: Callable[[], Any]
    data: Callable[[], Any]
    trainer: Callable[..., Any] = pl.Trainer
    options: dict[str, Any] = field(default_factory=dict)


class Watch(pl.Callback):
    """Keeps the weights after the first epoch, the first gradients and the activation rates of the later epochs."""

    def __init__(self, callback: SparseSelectionCallback | None = None) -> None:
        self.callback = callback
        self.after_first_epoch: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.rates: list[float] = []
        self.stages: list[str] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.gradients:
            named = pl_module.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.callback is not None and self.callback.activation_rate is not None:
            self.stages.append(self.callback.stage)
            if self.callback.stage == "sparse":
                self.rates.append(self.callback.activation_rate)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.after_first_epoch:
            self.after_first_epoch = weights(pl_module)


def fit(case: Case, *callbacks: Any, **options: Any) -> Any:
    """The module after a fit."""
    torch.manual_seed(0)
    module, data = case.module(), case.data()
    trainer = case.trainer(callbacks=list(callbacks), **{**QUIET, **case.options, **options})
    torch.manual_seed(1)
    trainer.fit(module, *(data if isinstance(data, tuple) else (data,)))
    return module


def sparse_fit(case: Case, mode: str, **settings: Any) -> tuple[Any, SparseSelectionCallback, Watch]:
    """One epoch of warmup, then sparse ones."""
    callback = SparseSelectionCallback(**{"mode": mode, "target_activation_rate": RATE, **settings})
    watch = Watch(callback)
    module = fit(case, callback, TwoStageScheduler(warmup_epochs=1), watch, max_epochs=3 if mode == "prune" else 2)
    return module, callback, watch


def check_trained(case: Case, mode: str) -> SparseSelectionCallback:
    """Warmup and rate 1 are bitwise the plain run; sparse epochs train, at the target rate, to finite weights.

    Returns:
        The callback of the sparse run.
    """
    watched = Watch()
    plain = fit(case, watched, max_epochs=2)
    if mode != "prune":  # which refuses a run without a pruned epoch
        ones = fit(case, SparseSelectionCallback(mode=mode, target_activation_rate=1.0), max_epochs=2)  # type: ignore[arg-type]
        assert_same_weights(weights(plain), weights(ones))
    module, callback, watch = sparse_fit(case, mode)
    assert_same_weights(watched.after_first_epoch, watch.after_first_epoch)
    moved = [name for name, tensor in weights(module).items() if not torch.equal(tensor, watch.after_first_epoch[name])]
    expected = [name for name, p in module.named_parameters() if name in watch.gradients and p.requires_grad]
    assert set(expected) <= set(moved), f"did not move: {set(expected) - set(moved)}"
    assert all(bool(t.isfinite().all()) for t in weights(module).values() if t.is_floating_point())
    assert "warmup" in watch.stages
    assert "sparse" in watch.stages
    mean = sum(watch.rates) / len(watch.rates)
    assert abs(mean - RATE) < 0.2 * RATE, f"activation rate {mean:.3f}"
    return callback


def first_gradients(case: Case, mode: str) -> dict[str, Tensor]:
    """Of the same half of the first batch, BatchNorm exact."""
    callback = SparseSelectionCallback(
        mode=mode,  # type: ignore[arg-type]
        target_activation_rate=RATE,
        gate="topk",
        batchnorm="exact" if mode == "partial" else "selected",
    )
    watch = Watch(callback)
    fit(case, callback, watch, max_steps=1, max_epochs=1)
    return watch.gradients


def check_same_gradients(case: Case, *modes: str, tolerance: float = 1e-4, own_mean: bool = False) -> None:
    """The modes compute the same gradient of the same samples (no dropout; ``subset`` only without BatchNorm).

    Args:
        case: The module.
        modes: Compared with ``mask``.
        tolerance: Relative error allowed.
        own_mean: Whether a factor close to 1 that is common to all gradients is allowed.
    """
    reference = first_gradients(case, "mask")
    assert reference
    for mode in modes:
        found = first_gradients(case, mode)
        if own_mean:
            factor = sum(float(g.norm()) ** 2 for g in reference.values()) ** 0.5
            factor /= sum(float(g.norm()) ** 2 for g in found.values()) ** 0.5
            assert 0.5 < factor < 2
            found = {name: factor * gradient for name, gradient in found.items()}
        error = difference(reference, found)
        assert error < tolerance, f"{mode}: relative error {error:.2g}"


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Relative L2 over all gradients."""
    assert left.keys() == right.keys()
    norm = sum(float(t.double().norm()) ** 2 for t in left.values()) ** 0.5
    return sum(float((left[n] - right[n]).double().norm()) ** 2 for n in left) ** 0.5 / max(norm, 1e-12)


def check_halves(case: Case) -> None:
    """The rows of two halves of a batch add up to the whole gradient, and a half is not the whole."""
    watch = Watch()
    fit(case, watch, max_steps=1, max_epochs=1)
    whole = watch.gradients
    with halves(0):
        first = first_gradients(case, "mask")
    with halves(1):
        second = first_gradients(case, "mask")
    error = difference(whole, {name: (first[name] + second[name]) / 2 for name in first})
    assert error < 1e-4, f"relative error {error:.2g}"
    assert difference(whole, first) > 1e-4


@contextmanager
def halves(start: int) -> Iterator[None]:
    """Select every second sample."""

    def every_second(self: SampleSelector, significance: Tensor, **options: Any) -> Selection:
        return Selection(torch.arange(start, significance.numel(), 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleSelector, "select", every_second)
        yield


def loader(dataset: Any, batch_size: int = 32, **options: Any) -> DataLoader[Any]:
    """Batches of whole size, shuffled."""
    return DataLoader(dataset, **{"batch_size": batch_size, "shuffle": True, **options})


def rows(package: str) -> Any:
    """Parametrizes a test over the package's outcomes, mode by mode."""
    found = [(row, mode) for row in OUTCOMES if row.package == package for mode in row.modes]
    return pytest.mark.parametrize(("row", "mode"), found, ids=[f"{row.module}-{mode}" for row, mode in found])


def check_outcome(case: Case, row: Outcome, mode: str) -> None:
    """The row is true of this case."""
    if row.outcome == "refused":
        with pytest.raises(REFUSALS, match=row.message):
            sparse_fit(case, mode)
        return
    callback = check_trained(case, mode)
    if mode == "mask" and row.module != "GAN":  # whose first loss is the generator's
        check_halves(case)
    elif mode == "partial":
        assert row.dense in (None, bool(callback.dense_ops)), dict(callback.dense_ops)
        check_same_gradients(case, "partial")
    elif mode == "subset" and row.outcome == "exact":
        check_same_gradients(case, "subset", own_mean=row.own_mean)
