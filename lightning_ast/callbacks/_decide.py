"""From the gradient of a batch to what the gate keeps: the module's own hooks, the score, the selector, the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.callbacks._checks import check_scores
from lightning_ast.callbacks._logs import note_first_selection, note_score
from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.callbacks._processes import Processes
from lightning_ast.callbacks._quarantine import Quarantine
from lightning_ast.callbacks._scored import Scored
from lightning_ast.core.batch import first_input, select_batch
from lightning_ast.core.gradient_gate import Kept
from lightning_ast.core.layout import common_ratio
from lightning_ast.core.losses import LossRecord
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import SignificanceFn, SignificanceName, compute_significance
from lightning_ast.mixin import SparseLossMixin, overrides

__all__ = ["Decision"]


class Decision:
    """Scores and selects: the mixin's methods where the module uses it, the core's functions where not.

    Args:
        module: The LightningModule.
        significance: The callback's; a module's own ``significance`` method wins.
        selector: The rule.
        processes: The distributed processes of this run.
        quarantine: Tells which samples may be selected.
        divisor: ``(own, scale) -> shared``: from a batch's own denominator and its number of samples to the denominator
            that all processes and all batches of an optimizer step share.

    Attributes:
        needs_losses: Whether the score is computed from the values of torch's loss functions.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        significance: SignificanceName | SignificanceFn,
        selector: SampleSelector,
        processes: Processes,
        quarantine: Quarantine,
        divisor: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        mixed: Any = module if isinstance(module, SparseLossMixin) else None
        self.indices: Callable[[Any], Tensor | None] = mixed.sample_indices if mixed else lambda batch: None
        self._significance = mixed.significance if overrides(module, "significance") else significance
        self._take = mixed.select_batch if overrides(module, "select_batch") else None
        self.needs_losses = self._significance != "gradient"
        self._selector = selector
        self._average = processes.mean if processes.count > 1 else None
        self._quarantine = quarantine
        self._divisor = divisor
        self._scored = self._checked = self._warned = self._selected = False

    # ------------------------------------------------------------------ scores

    def scores(self, plan: BatchPlan, batch: Any, record: LossRecord) -> Tensor:
        """Score a batch by the values of its losses.

        Args:
            plan: The plan of the batch, which knows the samples that are not finite.
            batch: The batch as loaded.
            record: Its losses, and what they were computed from.

        Returns:
            ``(B,)`` significance, finite and non-negative.

        Raises:
            ConfigurationError: A score of the user's own has no usable value in the first batch.
        """
        if not self._scored:
            self._scored = True
            note_score(record, el2n=self._significance == "el2n")
        check = partial(self._check_own, plan.bad) if callable(self._significance) else None
        inputs = first_input(batch, record.losses.numel())
        return compute_significance(self._significance, record, record.losses, inputs, check=check)

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

    # ------------------------------------------------------------------ the selection

    def decide(self, plan: BatchPlan, scores: Tensor, finite: Tensor, labels: Tensor | None) -> Kept | None:
        """Decide what the gate lets through.

        Args:
            plan: The plan of the batch, to be completed.
            scores: ``(B,)`` significance.
            finite: ``(B,)`` what is NaN or infinite where a sample must not be trained on: norms or losses.
            labels: ``(B,)`` class indices, or None.

        Returns:
            What is kept; None for everything, unchanged.
        """
        eligible = self._quarantine.eligible(plan, finite)
        scores = scores.nan_to_num(0.0, 0.0, 0.0)
        plan.note(scores, labels)
        self._tell(plan, scores)
        if not plan.sparse and not plan.leave_out:
            waits = finite.device.type != "cpu" and plan.offered == plan.batch_size  # a dense epoch waits for nothing
            if eligible is None or waits or bool(eligible.all()):
                return None
            plan.leave_out = True
        if plan.leave_out:
            plan.select(plan.everything(scores.device).among(eligible))
        elif plan.selection is None:
            self.select(plan, scores, eligible)
        elif eligible is not None:
            plan.select(plan.selection.among(eligible))
        return self.kept(plan, scores)

    def select(self, plan: BatchPlan, scores: Tensor, eligible: Tensor | None) -> None:
        """Choose the samples of a batch that are trained on.

        Args:
            plan: The plan of the batch, to be completed.
            scores: ``(B,)`` significance.
            eligible: ``(B,)`` bool, or None for all.
        """
        selection = self._selector.select(scores, eligible=eligible, average=self._average)
        plan.select(selection)
        if not self._selected:
            self._selected = True
            note_first_selection(self._selector, batch_size=scores.numel(), selection=selection)

    def take_subset(self, plan: BatchPlan, batch: Any, scored: Scored) -> None:
        """Select and slice a batch ahead of its step, for ``subset``.

        Args:
            plan: The plan of the batch, to be completed.
            batch: The batch as loaded.
            scored: What its scoring pass found.
        """
        finite, scores = scored.norms, scored.norms
        if scored.record is not None:
            finite = scored.record.losses
            scores = self.scores(plan, batch, scored.record)
        with torch.no_grad():
            eligible = self._quarantine.eligible(plan, finite)
            scores = scores.nan_to_num(0.0, 0.0, 0.0)
            plan.note(scores, scored.labels)
            self.select(plan, scores, eligible)
        if plan.void or (plan.known_bad and plan.selected == 1):
            return  # the step sees the whole batch: BatchNorm cannot do with one sample
        assert plan.selection is not None
        indices = plan.selection.indices
        take = self._take or partial(select_batch, batch_size=plan.batch_size)
        plan.sub_batch = take(batch, indices)
        plan.scored_norms = scored.norms[indices]

    def kept_of_part(self, plan: BatchPlan, norms: Tensor) -> Kept:
        """Weigh the samples of a batch that was sliced ahead of its step, in ``subset``.

        Args:
            plan: The plan of the batch, with its selection.
            norms: ``(k,)`` norms of their rows of the gradient of the step's loss, times k.
        """
        kept = self.kept(plan, norms)
        if plan.scored_norms is None or kept.factors is None or kept.factors.numel() != plan.scored_norms.numel():
            return kept
        return replace(kept, factors=kept.factors * common_ratio(plan.scored_norms, norms).to(kept.factors))

    def _tell(self, plan: BatchPlan, scores: Tensor) -> None:
        if plan.observe is not None:
            if plan.bad is not None:
                scores = scores.where(~plan.bad.to(scores.device), torch.full_like(scores, torch.inf))
            plan.observe(scores)

    # ------------------------------------------------------------------ the weights

    def kept(self, plan: BatchPlan, like: Tensor) -> Kept:
        """Weigh a selection as a part of one large batch.

        The gradient of a mean over B samples has rows that were divided by B. They are multiplied by ``w * B / d``,
        with d the sum of the weights w (``unbiased``: B), over all processes and micro-batches.

        Args:
            plan: The plan of the batch, with its selection.
            like: A tensor of the device and the type of the weights.
        """
        assert plan.selection is not None
        indices, weights = plan.selection.indices, plan.selection.weights
        size = plan.forwarded
        ones = torch.ones_like(indices, dtype=like.dtype, device=like.device)
        weights = ones if weights is None or plan.leave_out else weights.to(ones)
        if plan.sub_batch is not None:
            indices = torch.arange(size, device=indices.device)
        own = weights.sum()
        offered = own.new_tensor(float(plan.batch_size))
        if self._selector.weighting == "unbiased" and not plan.leave_out:
            own = offered if plan.bad is None else (~plan.bad).sum().to(own)
        if plan.void:
            own = torch.zeros_like(own)
        shared = own if plan.leave_out else self._divisor(own, offered)  # no other process knows of a dense step
        factors = weights * size / shared.where(shared > 0, torch.ones_like(shared))
        return Kept(
            indices[:0] if plan.void else indices,
            factors[:0] if plan.void else factors,
            rows_only=plan.leave_out or plan.known_bad,
        )
