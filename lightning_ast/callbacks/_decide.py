"""From the losses of a batch to the samples that are kept: the module's own hooks, the score and the selector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.callbacks._checks import check_scores
from lightning_ast.callbacks._logs import note_first_selection, note_score
from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.callbacks._processes import Processes
from lightning_ast.callbacks._quarantine import Quarantine
from lightning_ast.core.batch import batch_size_of, first_input, select_batch
from lightning_ast.core.listing import listed_length, samples_of
from lightning_ast.core.losses import LossRecord, mean_without
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import SignificanceFn, SignificanceName, compute_significance
from lightning_ast.mixin import SparseLossMixin, overrides

__all__ = ["Decision"]


class Decision:
    """Counts, scores and selects: the mixin's methods where the module uses it, the core's functions where not.

    Args:
        module: the LightningModule.
        significance: the callback's; a module's own ``significance`` method wins.
        selector: the rule.
        processes: that train together.
        quarantine: says which samples may be selected.

    Attributes:
        indices: ``(batch) -> (B,)`` dataset indices, or None where they are in the order of drawing.
        weighting: importance weights of the selection.
        quarantine: as given.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        significance: SignificanceName | SignificanceFn,
        selector: SampleSelector,
        processes: Processes,
        quarantine: Quarantine,
    ) -> None:
        mixed: Any = module if isinstance(module, SparseLossMixin) else None
        self._count = mixed.count_samples if overrides(module, "count_samples") else None
        self._take = mixed.select_batch if overrides(module, "select_batch") else None
        self._lists: bool | None = None
        self.indices: Callable[[Any], Tensor | None] = mixed.sample_indices if mixed else lambda batch: None
        self._significance = mixed.significance if overrides(module, "significance") else significance
        self._selector = selector
        self.weighting = selector.weighting
        self._average = processes.mean if processes.count > 1 else None
        self.quarantine = quarantine
        self._scored = self._checked = self._warned = self._selected = False

    def count(self, batch: Any) -> int:
        """Count the samples of a batch; what listed them once lists them always, also where a batch does not show it.

        Raises:
            BatchError: It cannot be told how many there are.
        """
        if self._count is not None:
            return int(self._count(batch))
        listed = listed_length(batch) if self._lists else None
        if listed is not None:
            return listed
        size = batch_size_of(batch)
        if self._lists is None:
            self._lists = samples_of(batch) is not None
        return size

    def scores(self, plan: BatchPlan, batch: Any, losses: Tensor, record: LossRecord | None) -> Tensor:
        """Score a batch.

        Args:
            plan: The plan of the batch, which knows the samples that are not finite.
            batch: The batch as loaded.
            losses: ``(B,)``.
            record: What the losses were computed from, or None where that is not known.

        Returns:
            ``(B,)`` significance, finite and non-negative.

        Raises:
            ConfigurationError: A score of the user's own has no usable value in the first batch.
        """
        if not self._scored:
            self._scored = True
            note_score(record, el2n=self._significance == "el2n")
        check = partial(self._check_own, plan.bad) if callable(self._significance) else None
        inputs = first_input(batch, losses.numel())
        return compute_significance(self._significance, record, losses, inputs, check=check)

    def _check_own(self, bad: Tensor | None, raw: Tensor) -> None:
        """Look at every batch until something was warned of; on an accelerator at the first one, which waits for it."""
        if self._warned or (self._checked and raw.device.type != "cpu"):
            return
        known = raw if bad is None else raw[~bad.to(raw.device)]
        if known.numel() == 0:
            return
        warning = check_scores(known, first=not self._checked)
        self._checked = True
        if warning is not None:
            self._warned = True
            rank_zero_warn(warning)

    def select(self, plan: BatchPlan, batch: Any, losses: Tensor, record: LossRecord | None) -> None:
        """Choose the samples of a batch that are trained on; arguments as for :meth:`scores`."""
        eligible = self.quarantine.eligible(plan, losses)
        scores = self.scores(plan, batch, losses, record)
        plan.note(scores, None if record is None else record.labels)
        selection = self._selector.select(scores, eligible=eligible, average=self._average)
        plan.select(selection)
        if not self._selected:
            self._selected = True
            note_first_selection(self._selector, batch_size=losses.numel(), selection=selection)

    def take_subset(
        self, plan: BatchPlan, batch: Any, scored: tuple[Tensor, LossRecord | None] | None, *, explicit: bool
    ) -> None:
        """Select and slice a batch ahead of its step, for ``subset``.

        Args:
            plan: of the batch, filled in.
            batch: as loaded.
            scored: its losses ``(B,)`` and what they were computed from; None leaves the step dense.
            explicit: whether the losses are the module's own.
        """
        if scored is None:
            plan.sparse = False
            return
        losses, record = scored
        self.select(plan, batch, losses, record)
        assert plan.selection is not None
        if plan.void or (plan.known_bad and plan.selected == 1):
            return  # the step sees the whole batch: BatchNorm cannot do with one sample
        indices = plan.selection.indices
        if self._take is None:
            plan.sub_batch = select_batch(batch, indices, batch_size=plan.batch_size)
        else:
            plan.sub_batch = self._take(batch, indices)
        if record is None or explicit:
            plan.full_loss = mean_without(losses, plan.bad)
        else:
            record = record.without(plan.bad)
            plan.full_loss, plan.total_count, plan.elements = record.total, record.counts.sum(), record.elements
