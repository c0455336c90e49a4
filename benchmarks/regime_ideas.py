"""Ideas that might make pruning better, each one change of `mode="prune"` in the regime map (option ``idea``).

What an idea changes of the remembered significance is a subclass of the history, put in its place while the fit runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from prune_ideas import AveragedScores, Progress
from regime_data import RegimeData
from regime_networks import ClassifierModule
from regime_run import Run
from torch import Tensor

from lightning_ast import SparseSelectionCallback
from lightning_ast.core import SampleSelector, SignificanceHistory, select_rows
from lightning_ast.core import plan_rules as _plan_rules
from lightning_ast.core import selector as _selector
from lightning_ast.pruning import sample_book as _sample_book

__all__ = [
    "IDEAS",
    "ClassFloor",
    "CountedAveragedScores",
    "HigherRate",
    "PartialInsideModule",
    "RandomBeside",
    "ScaledGradient",
    "SmallerSteps",
    "Smoothed",
    "changes",
]


class RandomBeside(SignificanceHistory):
    """A small random share of the samples counts as the most significant, another in each epoch.

    Args:
        size: The samples of the data set.
        share: The random share.
        seed: The seed of the draws.
    """

    def __init__(self, size: int, *, share: float, seed: int) -> None:
        super().__init__(size)
        self._share = share
        self._generator = torch.Generator().manual_seed(seed)

    def significance(self, *, trim: float = 0.0) -> Tensor:
        scores = super().significance(trim=trim).clone()
        drawn = torch.randperm(len(scores), generator=self._generator)[: round(self._share * len(scores))]
        scores[drawn] = scores.max()
        return scores


class ClassFloor(SignificanceHistory):
    """The most significant samples of each class count as the most significant of all: no class falls below a share.

    Args:
        size: The samples of the data set.
        labels: ``(N,)`` their classes.
        share: The share of each class.
    """

    def __init__(self, size: int, *, labels: Tensor, share: float) -> None:
        super().__init__(size)
        classes = [(labels == label).nonzero().squeeze(1) for label in range(int(labels.max()) + 1)]
        self._classes = [rows for rows in classes if len(rows)]
        self._share = share

    def significance(self, *, trim: float = 0.0) -> Tensor:
        scores = super().significance(trim=trim).clone()
        most = scores.max()
        for rows in self._classes:
            kept = max(1, round(self._share * len(rows)))
            scores[rows[scores[rows].topk(kept).indices]] = most
        return scores


class Smoothed(SignificanceHistory):
    """What is remembered of a sample is the mean of its last score and of what was remembered before."""

    def fold(self, maximum: Callable[[Tensor], Tensor] | None = None) -> None:
        before = self._scores.clone()
        super().fold(maximum)
        seen_before = before.isfinite() & (before >= 0) & self._scores.isfinite()
        self._scores = torch.where(seen_before, 0.5 * (before + self._scores), self._scores)


class CountedAveragedScores(AveragedScores):
    """Scores of a weight-averaged model, whose forward is counted."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self._module = pl_module

    def score(self, losses: Tensor, logits: Any, inputs: Any, targets: Any) -> Tensor:
        self._module.extra_forwarded += len(losses)
        return super().score(losses, logits, inputs, targets)


class HigherRate(Callback):
    """KAKURENBO's rule for what is skipped: a learning rate higher by 1 / (1 - F), F being the share that is skipped.

    Source: Nguyen et al., KAKURENBO, NeurIPS 2023, arXiv 2310.10102.

    Args:
        selection: The selection callback of the run.
        rate: The share of the samples of a pruned epoch.
    """

    def __init__(self, selection: SparseSelectionCallback, rate: float) -> None:
        self._selection = selection
        self._rate = rate

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._selection.stage == "sparse":  # the schedule sets the rate anew after each step
            for group in trainer.optimizers[0].param_groups:
                group["lr"] /= self._rate


def _share_left(trainer: pl.Trainer, batch: Any) -> float:
    """Return the samples of a batch as a share of those of a dense one."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return len(batch[1]) / float(data.regime.batch_size)


class SmallerSteps(Callback):
    """A learning rate lower by the share of the samples that a batch of a pruned epoch has left."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for group in trainer.optimizers[0].param_groups:  # the schedule sets the rate anew after each step
            group["lr"] *= _share_left(trainer, batch)


class ScaledGradient(Callback):
    """The gradient times the share of the samples that a batch has left: each counts as it does in a dense batch."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._share)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._share = _share_left(trainer, batch)


class PartialInsideModule(ClassifierModule):
    """A partial backward over two thirds of each batch of a pruned epoch."""

    def on_fit_start(self) -> None:
        self._selector = SampleSelector(target_activation_rate=2 / 3, weighting="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        losses = F.cross_entropy(self(images), labels, reduction="none")
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        selection = next(each for each in callbacks if isinstance(each, SparseSelectionCallback))
        if selection.stage != "sparse":
            return losses.mean()
        kept = self._selector.select(losses.detach())
        self.spared_backwards += len(labels) - len(kept.indices)
        return select_rows(losses, kept.indices, kept.weights) / len(kept.indices)


_Make = Callable[[Run, RegimeData], Callable[[int], SignificanceHistory]]


def _class_floor(run: Run, data: RegimeData) -> Callable[[int], SignificanceHistory]:
    labels = data.training.labels.repeat(data.training.redundancy)
    return functools.partial(ClassFloor, labels=labels, share=0.5 * float(run.option("rate", 0.4)))


_HISTORIES: dict[str, _Make] = {
    "plain": lambda run, data: SignificanceHistory,
    "random-beside": lambda run, data: functools.partial(RandomBeside, share=0.05, seed=run.seed),
    "class-floor": _class_floor,
    "progress": lambda run, data: Progress,
    "smoothed": lambda run, data: Smoothed,
}

IDEAS = [*_HISTORIES, "averaged-model", "bounded", "higher-rate", "partial-inside", "trimmed"]
IDEAS += ["least-batch-32", "scaled-gradient", "smaller-steps"]

_LEAST_PROBABILITY = 0.5
"""That of the idea ``bounded``, as InfoBatch has it: with unbiased weights, none exceeds 2."""


@contextmanager
def changes(run: Run, data: RegimeData) -> Iterator[None]:
    """Let the fits in this context remember significance, and draw samples, as the idea of a run has it."""
    idea = run.option("idea", "plain")
    make = _HISTORIES.get(idea, _HISTORIES["plain"])
    with ExitStack() as changed:
        changed.enter_context(patch.object(_sample_book, "SignificanceHistory", make(run, data)))
        if idea == "least-batch-32":
            changed.enter_context(patch.object(_plan_rules, "_LEAST_BATCH", 32))
        for module in (_plan_rules, _selector) if idea == "bounded" else ():
            changed.enter_context(patch.object(module, "floor_for", lambda target: _LEAST_PROBABILITY))
        yield
