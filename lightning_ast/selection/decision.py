"""From the gradient or the losses of a batch to the samples that are trained on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_ast.core.batch.inputs import first_input
from lightning_ast.core.gate import Selection
from lightning_ast.core.gradient_gate import Kept
from lightning_ast.core.losses.capture import LossRecord
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import compute_significance
from lightning_ast.errors import ConfigurationError
from lightning_ast.mixin import SparseLossMixin, overrides
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.step_state import StepState, Treatment
from lightning_ast.selection.weights import RowWeights
from lightning_ast.words import counted

__all__ = ["Decision", "check_labels"]

_EXCESS = 0.02  # coverage above its target that one sample more or less does not explain
_FEW = 2  # samples that may well carry a coverage on their own, in one batch of many


class Decision:
    """Scores and selects: by the module's own ``significance`` where it has one, else by the callback's."""

    def __init__(self, parts: FitParts) -> None:
        module = parts.module
        self._significance = parts.settings.significance
        if isinstance(module, SparseLossMixin) and overrides(module, "significance"):
            self._significance = module.significance
        self.needs_losses = self._significance != "gradient"
        self._selector = parts.selector
        self._average = parts.processes.mean if parts.processes.count > 1 else None
        self._quarantine = parts.quarantine
        self.weights = RowWeights(parts)
        self._told = WarningCache()
        self._has_checked = False
        self._has_warned = False
        self._has_selected = False

    def scores(self, step: StepState, batch: Any, record: LossRecord) -> Tensor:
        """Score a batch by the values of its losses: ``(B,)``, finite and non-negative."""
        if self._significance == "el2n" and record.kind == "regression":
            message = f"lightning-ast: EL2N is not defined for {record.name}: the loss itself is the significance."
            self._told.info(message)  # once
        # The checks of a user's own score must not blame it for samples that have no finite loss.
        bad = ~record.losses.isfinite()
        if step.bad is not None:
            bad = bad | step.bad.to(bad.device)
        check = partial(self._check_own, bad) if callable(self._significance) else None
        inputs = first_input(batch, record.losses.numel())
        return compute_significance(self._significance, record, record.losses, inputs, check=check)

    def _check_own(self, bad: Tensor, raw: Tensor) -> None:
        # Every batch until something was warned of; on an accelerator the first one alone, because it waits for it
        if self._has_warned or (self._has_checked and raw.device.type != "cpu"):
            return
        known = raw[~bad]
        if known.numel() == 0:
            return
        warning = _doubt_of_scores(known, first=not self._has_checked)
        self._has_checked = True
        if warning is not None:
            self._has_warned = True
            rank_zero_warn(warning)

    def decide(self, step: StepState, scores: Tensor, finite: Tensor, labels: Tensor | None) -> Kept | None:
        """Decide what the gate lets through: None for everything, unchanged.

        Args:
            scores: ``(B,)`` significance.
            finite: ``(B,)`` norms or losses, NaN or infinite where a sample must not be trained on.
            labels: ``(B,)`` class indices, or None.
        """
        device = scores.device
        bad = step.bad
        if step.selects or step.counts_as_one_batch:  # the host selects: one wait, and none for what follows
            scores, finite, bad = _on_host(scores, finite, bad)
        eligible = self._quarantine.eligible(step, finite, bad)
        scores = self._observed(step, scores, labels, eligible)
        # A dense step stays the plain run's, bitwise, unless a sample in it has to be left out.
        if step.treatment in (Treatment.DENSE, Treatment.OBSERVED):
            waits = finite.device.type != "cpu" and not step.facts.is_planned  # a dense step waits for nothing
            if eligible is None or waits or bool(eligible.all()):
                return None
            step.treatment = Treatment.CLEANED
        if step.treatment in (Treatment.CLEANED, Treatment.WEIGHTED):
            step.selection = Selection(torch.arange(step.batch_size, device=scores.device)).among(eligible)
        elif step.selection is None:
            self._select(step, scores, eligible)
        else:  # the epoch's plan, the scoring pass or the rule that skips it has selected
            step.selection = step.selection.among(eligible)
        return self.weights.of_whole(step, device) if step.is_whole else self.weights.of_step(step, device)

    def decide_ahead(self, step: StepState, scores: Tensor, finite: Tensor, labels: Tensor | None) -> None:
        """Select ahead of the step, for ``subset``; see :meth:`decide`."""
        scores, finite, bad = _on_host(scores, finite, step.bad)
        eligible = self._quarantine.eligible(step, finite, bad)
        self._select(step, self._observed(step, scores, labels, eligible), eligible)

    def _observed(self, step: StepState, scores: Tensor, labels: Tensor | None, eligible: Tensor | None) -> Tensor:
        scores = scores.nan_to_num(0.0, 0.0, 0.0)  # one NaN would make every keep-probability NaN
        if step.user_weights is not None:  # a sample matters as much as it has a part in the weighted loss
            scores = scores * step.user_weights.to(scores)
        step.significance = scores.detach()
        step.labels = labels if step.labels is None else step.labels
        if step.facts.observe is not None:
            # the history is told of a sample that is not finite by infinity
            step.facts.observe(scores if eligible is None else scores.masked_fill(~eligible, torch.inf))
        return scores

    def _select(self, step: StepState, scores: Tensor, eligible: Tensor | None) -> None:
        check_labels(self._selector.class_floor, step.labels)
        step.selection = self._selector.select(scores, eligible=eligible, average=self._average, classes=step.labels)
        if self._selector.is_whole:
            step.treatment = Treatment.WHOLE
        if not self._has_selected:
            self._has_selected = True
            _warn_of_minimum(self._selector, step.selection, batch_size=scores.numel())


def check_labels(class_floor: float, labels: Tensor | None) -> None:
    """Refuse a floor by class where the classes are not known."""
    if class_floor > 0 and labels is None:
        raise ConfigurationError(
            "class_floor needs the class of each sample, and no torch classification loss of the training step was "
            "told it: override SparseLossMixin.sample_labels(batch) to return the class indices (B,)."
        )


def _on_host(scores: Tensor, finite: Tensor, bad: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what is known of the samples, ``(B,)`` each, on the host."""
    if scores.device.type == "cpu":
        return scores, finite, bad
    columns = [scores, finite] if bad is None else [scores, finite, bad]
    wide = torch.promote_types(scores.dtype, finite.dtype)  # a float64 loss may be infinite as a float32
    copied = torch.stack([column.to(scores.device, wide) for column in columns]).cpu()  # at once: each copy waits
    scores, finite, *rest = [row.to(column.dtype) for row, column in zip(copied, columns, strict=True)]
    return scores, finite, rest[0] if rest else None


def _doubt_of_scores(values: Tensor, *, first: bool) -> str | None:
    """Return the warning that the scores ``(n,)``, n >= 1, of a user's own significance function ask for, or None."""
    # The gate counts a score that is negative, NaN or infinite as 0. Where all scores are 0, it selects at random.
    finite = values.isfinite()
    negative = int((finite & (values < 0)).sum())
    broken = int((~finite).sum())
    useful = bool((finite & (values > 0)).any())
    if negative + broken == 0 and (useful or not first or values.numel() == 1):
        return None
    if negative + broken == 0:
        return (
            f"lightning-ast: the significance of all {values.numel()} samples of the first batch is 0: samples that "
            "are all alike are selected at random. Expected larger values for samples that matter more."
        )
    message = (
        "significance must give a finite value of at least 0 for each sample, a larger one for samples that matter "
        f"more. Of {values.numel()} values, {negative} are negative and {broken} are NaN or infinite"
    )
    remedy = "subtract the smallest possible value or take exp(), and mend what gives NaN or infinity"
    if first and not useful:
        raise ConfigurationError(f"{message}, and none is above 0: selection would be random. So {remedy}.")
    return f"lightning-ast: {message}. These count as 0, and such samples are hardly ever selected: {remedy}."


def _warn_of_minimum(selector: SampleSelector, selection: Selection, *, batch_size: int) -> None:
    """Warn where the fewest samples allowed are more than the target."""
    least = selector.least(batch_size)
    if selector.is_whole or selection.indices.numel() != least:
        return
    target = selector.target
    held = "activation rate"
    exceeds = least > target * batch_size
    if selector.share_of == "significance":
        held = "coverage"
        exceeds = least > _FEW and selector.coverage is not None and selector.coverage > target + _EXCESS
    if exceeds:
        rank_zero_warn(
            f"lightning-ast: min_selected keeps {least} of {counted(batch_size, 'sample')}, so the {held} "
            f"cannot fall to its target of {target:g}: use larger batches or a smaller min_selected."
        )
