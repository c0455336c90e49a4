"""The samples of an epoch as the selection saw them, and what became of each over the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ast.monitoring.guard import Guard
from lightning_ast.schedule import Stage
from lightning_ast.selection.fit_parts import Watcher
from lightning_ast.selection.session import Session
from lightning_ast.selection.step_state import StepState

__all__ = ["EpochSamples", "SampleHistory", "SampleWatcher"]

BINS = 20  # parts of an epoch that the threshold is shown in


@dataclass(frozen=True)
class EpochSamples:
    """The n samples offered in the sparse batches of an epoch, on the CPU."""

    significance: Tensor  # (n,) that the selection was made from
    selected: Tensor  # (n,) bool
    labels: Tensor | None  # (n,) class indices, -1 where one is not known
    indices: Tensor | None  # (n,) in the dataset
    thresholds: Tensor  # (BINS,) the mean of each part of the epoch, NaN where it was dense

    def class_activation(self) -> Tensor | None:
        """Return the share of each class that was selected, ``(C,)``, NaN for an empty class; None without labels."""
        if self.labels is None or not bool((known := self.labels >= 0).any()):
            return None
        offered = self.labels[known].bincount()
        return self.labels[known & self.selected].bincount(minlength=len(offered)) / offered


class SampleWatcher(Watcher):
    """A collector of an epoch's sparse batches, left on their device: nothing is waited for before the epoch's end."""

    wants_labels = True

    def __init__(self, session: Session, indices: Callable[[int], Tensor | None], *, size: int | None) -> None:
        self._session = session
        self._indices = indices
        self._size = size
        self._guard = Guard("watching the samples")
        self._stage: Stage = "warmup"
        self._labels = torch.empty(0, dtype=torch.long)
        self._start()

    def _start(self) -> None:
        self._batches = 0
        self._rows: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._thresholds: list[tuple[int, Tensor]] = []

    @property
    def seconds(self) -> float:
        """Return the time that watching took."""
        return self._guard.seconds

    def start_stage(self, stage: Stage) -> None:
        """Remember the stage: dense ones are not collected."""
        self._stage = stage

    def indices(self, batch_size: int) -> Tensor | None:
        """Return the dataset indices of the batch that arrives, or None."""
        drawn = None
        with self._guard():
            drawn = self._indices(batch_size)
        return drawn  # noqa: RET504 - not set where the guard ended the block

    def finish_batch(self, step: StepState) -> None:
        """Keep what the selection was made from."""
        with self._guard():
            self._keep(step)

    def _keep(self, step: StepState) -> None:
        self._batches += 1
        if self._stage == "sparse" and (threshold := self._session.selector.last_threshold) is not None:
            self._thresholds.append((self._batches, threshold))  # on its device: reading it would wait for the step
        labels = None if step.labels is None else step.labels.clone()  # a view would keep what it is a view of
        epochs = self._session.epochs
        known = epochs is not None and not epochs.batches_are_samples  # a ready batch has no label of its own
        if labels is not None and step.indices is not None and known:
            self._seen.append((step.indices, labels))
        if self._stage != "sparse" or epochs is not None or step.significance is None:
            return
        selected = torch.ones_like(step.significance, dtype=torch.bool)
        if step.selection is not None:
            selected = torch.zeros_like(selected).index_fill_(0, step.selection.indices, True)
        self._rows.append((step.significance, selected, labels, step.indices))

    def take(self) -> EpochSamples | None:
        """Return what was collected, and begin anew; None where no batch was sparse."""
        rows = self._rows
        seen = self._seen
        thresholds = self._thresholds
        batches = self._batches
        self._start()
        if seen:
            self._remember(torch.cat([i.cpu() for i, _ in seen]), torch.cat([labels for _, labels in seen]).cpu())
        binned = _binned(thresholds, batches)
        if self._session.epochs is not None:
            return self._planned(binned) if thresholds else None
        if not rows:
            return None
        significance, selected, labels, indices = zip(*rows, strict=True)
        scores = torch.cat(significance).cpu()
        kept = torch.cat(selected).cpu()
        known = _all(indices)
        if known is not None and (self._size is None or int(known.min()) < 0 or int(known.max()) >= self._size):
            known = None  # names of samples, and not places in the data set
        return EpochSamples(scores, kept, _all(labels), known, binned)

    def _planned(self, thresholds: Tensor) -> EpochSamples:
        epochs = self._session.epochs
        assert epochs is not None
        assert epochs.history is not None
        assert epochs.epoch.plan is not None
        significance = epochs.history.significance()
        selected = torch.zeros(len(significance), dtype=torch.bool)
        selected[epochs.epoch.plan.indices] = True
        # labels are known only of the samples that some batch has brought so far
        labels = torch.full((len(significance),), -1)
        labels[: len(self._labels)] = self._labels
        known = labels if len(self._labels) else None
        return EpochSamples(significance, selected, known, torch.arange(len(significance)), thresholds)

    def _remember(self, indices: Tensor, labels: Tensor) -> None:
        missing = int(indices.max()) + 1 - len(self._labels)
        if missing > 0:
            self._labels = torch.cat([self._labels, self._labels.new_full((missing,), -1)])
        self._labels[indices] = labels.long()


def _all(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    known = [part.cpu() for part in parts if part is not None]
    return torch.cat(known).long() if len(known) == len(parts) else None


def _binned(thresholds: list[tuple[int, Tensor]], batches: int) -> Tensor:
    bins = torch.full((BINS,), torch.nan)
    if thresholds:
        values = torch.stack([threshold.float() for _, threshold in thresholds]).cpu()
        places = torch.tensor([(batch - 1) * BINS // batches for batch, _ in thresholds])
        sums = torch.zeros(BINS).index_add(0, places, values)
        counts = places.bincount(minlength=BINS)
        bins[counts > 0] = sums[counts > 0] / counts[counts > 0]
    return bins


@dataclass
class SampleHistory:
    """The history of classes, thresholds and of the N samples of the data set, epoch by epoch."""

    classes: dict[int, Tensor] = field(default_factory=dict)  # (C,) shares by epoch, see EpochSamples.class_activation
    thresholds: dict[int, Tensor] = field(default_factory=dict)  # (BINS,) by epoch
    # (N,) how often each sample was offered in a sparse batch and selected, and the sum of its significance then
    offered: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    selected: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    worth: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, epoch: int, samples: EpochSamples) -> None:
        """Add an epoch."""
        self.thresholds[epoch] = samples.thresholds
        if (activation := samples.class_activation()) is not None:
            self.classes[epoch] = activation
        if samples.indices is None:
            return
        length = max(len(self.offered), int(samples.indices.max()) + 1)
        self.offered, self.selected, self.worth = (
            torch.cat([kept, kept.new_zeros(length - len(kept))]) for kept in (self.offered, self.selected, self.worth)
        )
        self.offered.index_add_(0, samples.indices, torch.ones_like(samples.indices, dtype=torch.int32))
        self.selected.index_add_(0, samples.indices, samples.selected.int())
        self.worth.index_add_(0, samples.indices, samples.significance.float().nan_to_num())

    def extremes(self, count: int) -> tuple[Tensor, Tensor]:
        """Find the dataset indices of the samples selected most and least, at most ``count`` each, of those offered."""
        # Of several that were selected equally often, the one of the larger mean significance counts as more selected.
        offered = self.offered.nonzero().flatten()
        share, worth = (each[offered] / self.offered[offered] for each in (self.selected, self.worth))
        order = offered[np.lexsort((worth.numpy(), share.numpy()))]  # by the last key first
        return order.flip(0)[:count], order[:count]

    def state_dict(self) -> dict[str, Any]:
        """Return the history as primitives and tensors."""
        return {**vars(self), "classes": dict(self.classes), "thresholds": dict(self.thresholds)}
