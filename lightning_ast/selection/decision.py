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

from lightning_ast.core.batch.samples import first_input, select_batch
from lightning_ast.core.gradient_gate import Kept
from lightning_ast.core.losses.capture import LossRecord
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import SignificanceFn, SignificanceName, compute_significance
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.mixin import SparseLossMixin, overrides
from lightning_ast.selection.checks import check_scores
from lightning_ast.selection.notices import note_first_selection, note_score
from lightning_ast.selection.quarantine import Quarantine
from lightning_ast.selection.scored import Scored
from lightning_ast.selection.step_state import BatchPlan
from lightning_ast.selection.sum_detector import SumDetector

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
        is_shared: Whether several processes weigh their selections together.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        significance: SignificanceName | SignificanceFn,
        selector: SampleSelector,
        processes: Processes,
        quarantine: Quarantine,
        divisor: Callable[[float, float], float],
    ) -> None:
        mixed: Any = module if isinstance(module, SparseLossMixin) else None
        self.indices: Callable[[Any], Tensor | None] = mixed.sample_indices if mixed else lambda batch: None
        self._significance = mixed.significance if overrides(module, "significance") else significance
        self._take = mixed.select_batch if overrides(module, "select_batch") else None
        self.needs_losses = self._significance != "gradient"
        self._selector = selector
        self.is_shared = processes.count > 1
        self._average = processes.mean if processes.count > 1 else None
        self._quarantine = quarantine
        self._divisor = divisor
        self._sums = SumDetector()
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
        bad = ~record.losses.isfinite()
        if plan.bad is not None:
            bad = bad | plan.bad.to(bad.device)
        check = partial(self._check_own, bad) if callable(self._significance) else None
        inputs = first_input(batch, record.losses.numel())
        return compute_significance(self._significance, record, record.losses, inputs, check=check)

    def _check_own(self, bad: Tensor, raw: Tensor) -> None:
        """Look at every batch until something was warned of; on an accelerator at the first one, which waits for it."""
        if self._warned or (self._checked and raw.device.type != "cpu"):
            return
        known = raw[~bad]
        if known.numel() == 0:
            return
        warning = check_scores(known, first=not self._checked)
        self._checked = True
        if warning is not None:
            self._warned = True
            rank_zero_warn(warning)

    # ------------------------------------------------------------------ the selection

    def decide(self, plan: BatchPlan, scores: Tensor, finite: Tensor, labels: Tensor | None) -> Kept | None:
        """Decide what the gate lets through, which is told on the device of the scores.

        Args:
            plan: The plan of the batch, to be completed.
            scores: ``(B,)`` significance.
            finite: ``(B,)`` what is NaN or infinite where a sample must not be trained on: norms or losses.
            labels: ``(B,)`` class indices, or None.

        Returns:
            What is kept; None for everything, unchanged.
        """
        device = scores.device
        if plan.sparse:  # the host selects: one wait, and none for what follows
            scores, finite = scores.cpu(), finite.cpu()
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
        return self.kept(plan, device)

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
        plan.sub_batch = self._taken(plan, batch, indices)
        plan.scored_norms = scored.norms[indices]

    def take_again(self, plan: BatchPlan, batch: Any, _: Any, positions: Tensor) -> Any:
        """Take some of the selected samples out of the whole batch.

        Among the selected ones alone, a tensor that is shared looks like the samples' own where it has as many rows.

        Args:
            plan: The plan of the batch, with its selection.
            batch: The batch as loaded.
            positions: Which of the selected samples.
        """
        assert plan.selection is not None
        indices = plan.selection.indices
        return self._taken(plan, batch, indices[positions.to(indices.device)])

    def _taken(self, plan: BatchPlan, batch: Any, indices: Tensor) -> Any:
        take = self._take or partial(select_batch, batch_size=plan.batch_size)
        return take(batch, indices)

    def _tell(self, plan: BatchPlan, scores: Tensor) -> None:
        if plan.observe is not None:
            if plan.bad is not None:
                scores = scores.where(~plan.bad.to(scores.device), torch.full_like(scores, torch.inf))
            plan.observe(scores)

    # ------------------------------------------------------------------ the weights

    def kept_of_subset(self, plan: BatchPlan, norms: Tensor) -> Kept:
        """Weigh the selection of a step that saw the selected samples alone.

        Args:
            plan: The plan of the batch, with its selection.
            norms: ``(k,)`` norms of their gradients in this step, times their number k.
        """
        kept = self.kept(plan, norms.device, self.finite_in_step(plan, norms))
        if plan.scored_norms is None or not self._sums.found_in(plan, norms):
            return kept
        assert kept.factors is not None
        return replace(kept, factors=kept.factors * (plan.batch_size / plan.forwarded))

    def finite_in_step(self, plan: BatchPlan, norms: Tensor) -> Tensor | None:
        """Look for samples whose gradient was finite in the scoring pass of ``subset`` and is not in its step.

        Returns:
            ``(k,)`` positions among the selected samples of those that are finite; None where the host knows of none
            that are not.
        """
        if self._quarantine.limit is None or plan.selection is None or norms.device.type != "cpu":
            return None
        finite = norms.isfinite()
        if plan.void or bool(finite.all()):
            return None
        bad = torch.zeros(plan.batch_size, dtype=torch.bool)
        plan.quarantine(bad.index_fill(0, plan.selection.indices[~finite], True))
        return finite.nonzero().flatten()

    def kept(self, plan: BatchPlan, device: torch.device, finite: Tensor | None = None) -> Kept:
        """Weigh a selection as a part of one large batch.

        The gradient of a mean over B samples has rows that were divided by B. They are multiplied by ``w * B / d``,
        with d the sum of the weights w (``unbiased``: B), over all processes and micro-batches.

        Args:
            plan: The plan of the batch, with its selection.
            device: The device of the gradient.
            finite: Positions among the selected samples of those that are kept after all; None keeps every one.
        """
        assert plan.selection is not None
        indices, weights = plan.selection.indices.cpu(), plan.selection.weights
        size = plan.forwarded
        ones = torch.ones(indices.numel(), dtype=torch.float64)
        weights = ones if weights is None or plan.leave_out else weights.to(ones)
        if plan.sub_batch is not None:
            indices = torch.arange(size)
        if finite is not None:
            indices, weights = indices[finite], weights[finite]
        if plan.void:
            indices, weights = indices[:0], weights[:0]
        own = float(weights.sum())
        if self._selector.weighting == "unbiased" and not plan.leave_out and not plan.void:
            own = float(plan.batch_size if plan.bad is None else (~plan.bad).sum())
        shared = own if plan.leave_out else self._divisor(own, float(plan.batch_size))  # no other process knows of it
        factors = weights * (size / shared) if shared > 0 else weights
        factors = factors.float() if device.type == "mps" else factors  # which has no larger type
        return Kept(
            indices.to(device, non_blocking=True),
            factors.to(device, non_blocking=True),
            rows_only=plan.leave_out or plan.known_bad or finite is not None,
        )
