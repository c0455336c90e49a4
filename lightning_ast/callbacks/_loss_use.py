"""What a training step makes of the losses that it is given: looked at once, ahead of the first backward."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.core.graph import averages, depends_on_samples
from lightning_ast.core.losses import REMEDY, LossCaptureError

__all__ = ["UseOfLosses"]


class UseOfLosses:
    """Checks how a module's training step uses the losses that were captured or that are its own.

    Args:
        module: The module that is trained.
        explicit: Whether the losses are the module's own.
        scored: Whether its step may see the selected samples alone (``subset``).

    Attributes:
        verified: Whether a first batch has been through, and was found to be usable.
    """

    def __init__(self, module: pl.LightningModule, *, explicit: bool, scored: bool) -> None:
        self._module = module
        self._explicit = explicit
        self._scored = scored
        self._first: tuple[int, Tensor] | None = None
        self.verified = False

    def check_step(self, plan: BatchPlan, output: Any) -> None:
        """Check a step that is over: that of the first batch, and in ``subset`` one that saw another number of samples.

        Args:
            plan: The plan of the batch, with what its step was given.
            output: What the step returned.
        """
        if not plan.seen:
            return
        if self._module.automatic_optimization and not self.verified:
            _check_use(plan, output, explicit=self._explicit, scored=self._scored)
            self._first = (plan.forwarded, _scale_of(plan, output)) if self._scored else None
        elif self._first is not None and plan.forwarded != self._first[0]:
            _check_scale(self._first, (plan.forwarded, _scale_of(plan, output)))
            self._first = None
        self.verified = True

    def check_backward(self, plan: BatchPlan | None, loss: Tensor) -> None:
        """Check the first step of manual optimization, whose backward comes before its end.

        Args:
            plan: The plan of the batch, or None: the step is the user's own.
            loss: The loss of the backward.
        """
        if self.verified or not self._explicit or self._module.automatic_optimization:
            return
        if plan is not None and plan.seen:
            _check_averaged(plan, loss, scored=self._scored)


def _check_use(plan: BatchPlan, output: Any, *, explicit: bool, scored: bool) -> None:
    """Check that what was intercepted is what is trained on, alone, and that explicit losses are averaged.

    Args:
        plan: The plan of the batch, with what its step was given.
        output: What the training step returned.
        explicit: Whether the losses are the module's own.
        scored: Whether the step may see the selected samples alone (``subset``).
    """
    loss, seen = _loss_of(output), plan.seen[0]
    if loss is None or loss is seen:
        return
    share = _share(loss, seen)
    if share is None:
        raise LossCaptureError(
            f"the loss that training_step returns does not depend on the one that was captured. {REMEDY}"
        )
    if explicit:
        _check_averaged(plan, loss, scored=scored)
        if scored and depends_on_samples(loss, seen, plan.forwarded):
            raise LossCaptureError(
                "training_step adds a term to its per-sample losses that depends on the samples too. In mode='subset' "
                "it would be that of the selected samples alone: put it into `per_sample_loss`, or, where it must stay "
                "whole, use mode='mask' or 'partial'."
            )
    elif depends_on_samples(loss, seen, plan.forwarded):
        raise LossCaptureError(
            "training_step adds a term to the captured loss that depends on the samples too, which would not be "
            "selected with it. Define `per_sample_loss(self, batch, batch_idx)`: with the term in it, or, where it "
            "must stay whole, train on `self.per_sample_loss(batch, batch_idx).mean() + term` (not in mode='subset')."
        )


def _loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returns, or None."""
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) else None


def _scale_of(plan: BatchPlan, output: Any) -> Tensor:
    """Sum the gradient of a step's loss with respect to what the step was given; 0 where there is none.

    It stays on its device: a step is not to wait for the value.
    """
    loss = _loss_of(output)
    share = None if loss is None else _share(loss, plan.seen[0])
    return torch.zeros(()) if share is None else share.sum()


def _share(loss: Tensor, seen: Tensor) -> Tensor | None:
    """The gradient of the loss with respect to what its step was given, or None where it does not depend on it."""
    if not (loss.requires_grad and seen.requires_grad):
        return None
    (share,) = torch.autograd.grad(loss.sum(), seen, retain_graph=True, allow_unused=True)
    return share


def _check_averaged(plan: BatchPlan, loss: Tensor, *, scored: bool) -> None:
    """Check that a training step makes of explicit losses what is right for those of a selection too.

    Args:
        plan: The plan of the batch, with the losses ``(B,)`` that its step was given.
        loss: Scalar that is trained on, or one of several: it may not depend on these losses.
        scored: Whether the step may see the selected samples alone (``subset``).
    """
    losses = plan.seen[0]
    share = _share(loss, losses)
    if share is None:
        return
    if scored and not averages(loss, losses):
        raise LossCaptureError(
            "training_step sums its per-sample losses, weights them or changes them one by one. In mode='subset' it "
            "sees the selected samples alone, so gradient and logged loss would not be those of the batch: train on "
            "their plain mean, `self.per_sample_loss(batch, batch_idx).mean()`, with weights and the like inside "
            "`per_sample_loss`; or use mode='mask' or 'partial'."
        )
    used, pruned = int((share != 0).sum()), plan.stands_for is not None
    if not scored and not pruned and used < losses.numel() and math.isclose(float(share.sum()), 1.0, rel_tol=1e-3):
        raise LossCaptureError(
            f"training_step trains on {used} of its {losses.numel()} per-sample losses (picked by an index, as the "
            "largest, or by weights of 0) and divides by their number. Selected samples stand for the whole batch, so "
            "the gradient would be too large: let `per_sample_loss` give 0 for the others and train on "
            "`self.per_sample_loss(batch, batch_idx).mean()`."
        )


def _check_scale(first: tuple[int, Tensor], now: tuple[int, Tensor]) -> None:
    """Check in ``subset`` that the loss is not multiplied or divided by the number of samples which the step sees.

    Args:
        first: Samples that a step saw, and the gradient of its loss with respect to the mean of their losses.
        now: The same of a step that saw another number of samples.
    """
    size, other_size = first[0], now[0]
    scale, other_scale = float(first[1]), float(now[1])
    by_count = math.isclose(scale * other_size, other_scale * size, rel_tol=1e-4)
    by_inverse = math.isclose(scale * size, other_scale * other_size, rel_tol=1e-4)
    if scale != 0 and (by_count or by_inverse):
        raise LossCaptureError(
            f"training_step {'multiplies' if by_count else 'divides'} its loss by the number of samples in the batch. "
            f"In mode='subset' it sees the selected samples alone ({other_size} here, {size} before), so the gradient "
            "would not be that of the batch: train on the plain mean of the losses, or use mode='mask' or 'partial'."
        )
