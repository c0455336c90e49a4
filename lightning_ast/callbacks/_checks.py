"""What is looked at once, at the first batch: that what is selected from is what is trained on, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ast.callbacks._faults import ConfigurationError
from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.callbacks._scoring import ScoringPass
from lightning_ast.core.graph import averages, depends_on_samples
from lightning_ast.core.losses import REMEDY, LossCaptureError, LossRecord
from lightning_ast.words import counted

__all__ = [
    "check_averaged",
    "check_indices",
    "check_scale",
    "check_scorable",
    "check_scores",
    "check_scoring",
    "check_use",
    "failed_on_subset",
    "loss_of",
    "scale_of",
]


def check_indices(indices: Any, size: int) -> None:
    """What ``sample_indices`` gives: ``(B,)`` integers, or None."""
    if indices is None:
        return
    if not isinstance(indices, Tensor) or indices.shape != (size,) or indices.is_floating_point():
        got = (
            f"shape {tuple(indices.shape)}, {indices.dtype}" if isinstance(indices, Tensor) else type(indices).__name__
        )
        raise ConfigurationError(
            [f"sample_indices must give an integer tensor of shape ({size},), each sample's index, or None; got {got}."]
        )


def check_scores(values: Tensor, *, first: bool) -> str | None:
    """Check what a score of the user's own says of a batch: a gate takes lost values as 0, and zeros as all alike.

    Args:
        values: ``(n,)`` of the samples whose losses are finite, n at least 1.
        first: Whether this is the first batch.

    Returns:
        What to warn of, or None.

    Raises:
        ConfigurationError: It is the first batch, and no usable value is left.
    """
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
        raise ConfigurationError([f"{message}, and none is above 0: selection would be random. So {remedy}."])
    return f"lightning-ast: {message}. These count as 0, and such samples are hardly ever selected: {remedy}."


def check_scorable(plan: BatchPlan, record: LossRecord, passed_over: int) -> None:
    """Whether the loss of the selected samples alone is the same loss, in ``subset``.

    Args:
        plan: of the batch.
        record: of its loss.
        passed_over: losses without gradient that stood before it.
    """
    if not record.mean:
        raise LossCaptureError(
            f"`{record.name}` was called with reduction='sum'. In mode='subset' the step sees fewer samples, so "
            "what it divides the sum by is not known: use reduction='mean', or mode='mask'."
        )
    if passed_over:
        raise LossCaptureError(
            "training_step computes a loss without gradient before the one it trains on, and scoring stops at the "
            "first: move it behind the training loss."
        )
    if plan.elements is not None and record.elements > plan.elements:
        raise LossCaptureError(
            f"the selected samples have {counted(record.elements, 'loss element')} each where the whole batch had "
            f"{plan.elements}: the batch was not sliced as a whole. Use SparseLossMixin and override "
            "`select_batch(batch, indices)`."
        )


def check_use(plan: BatchPlan, output: Any, *, explicit: bool, scored: bool) -> None:
    """Check that what was intercepted is what is trained on, alone, and that explicit losses are averaged.

    Args:
        plan: The plan of the batch, with what its step was given.
        output: What the training step returned.
        explicit: Whether the losses are the module's own.
        scored: Whether the step may see the selected samples alone (``subset``).
    """
    loss, seen = loss_of(output), plan.seen[0]
    if loss is None or loss is seen:
        return
    share = _share(loss, seen)
    if share is None:
        raise LossCaptureError(
            f"the loss that training_step returns does not depend on the one that was captured. {REMEDY}"
        )
    if explicit:
        check_averaged(plan, loss, scored=scored)
    elif depends_on_samples(loss, seen, plan.forwarded):
        raise LossCaptureError(
            "training_step adds a term to the captured loss that depends on the samples too, which would not be "
            "selected with it. Define `per_sample_loss(self, batch, batch_idx)`: with the term in it, or, where it "
            "must stay whole, train on `self.per_sample_loss(batch, batch_idx).mean() + term`."
        )


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returns, or None."""
    loss = output.get("loss") if isinstance(output, dict) else output
    return loss if isinstance(loss, Tensor) else None


def scale_of(plan: BatchPlan, output: Any) -> float:
    """The gradient of a step's loss with respect to what the step was given, summed; 0 where there is none."""
    loss = loss_of(output)
    share = None if loss is None else _share(loss, plan.seen[0])
    return 0.0 if share is None else float(share.sum())


def _share(loss: Tensor, seen: Tensor) -> Tensor | None:
    """The gradient of the loss with respect to what its step was given, or None where it does not depend on it."""
    if not (loss.requires_grad and seen.requires_grad):
        return None
    (share,) = torch.autograd.grad(loss.sum(), seen, retain_graph=True, allow_unused=True)
    return share


def check_averaged(plan: BatchPlan, loss: Tensor, *, scored: bool) -> None:
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


def check_scale(first: tuple[int, float], now: tuple[int, float]) -> None:
    """Check in ``subset`` that the loss is not multiplied or divided by the number of samples which the step sees.

    Args:
        first: Samples that a step saw, and the gradient of its loss with respect to the mean of their losses.
        now: The same of a step that saw another number of samples.
    """
    (size, scale), (other_size, other_scale) = first, now
    by_count = math.isclose(scale * other_size, other_scale * size, rel_tol=1e-4)
    by_inverse = math.isclose(scale * size, other_scale * other_size, rel_tol=1e-4)
    if scale != 0 and (by_count or by_inverse):
        raise LossCaptureError(
            f"training_step {'multiplies' if by_count else 'divides'} its loss by the number of samples in the batch. "
            f"In mode='subset' it sees the selected samples alone ({other_size} here, {size} before), so the gradient "
            "would not be that of the batch: train on the plain mean of the losses, or use mode='mask' or 'partial'."
        )


def check_scoring(
    module: pl.LightningModule, score: ScoringPass, batch: Any, batch_idx: int, size: int
) -> tuple[Tensor, LossRecord | None] | None:
    """Score a first batch, a dense one too: what scoring cannot do is known before the warmup.

    Args:
        module: whose parameters it must not change.
        score: scores.
        batch: to be trained on.
        batch_idx: its index.
        size: its samples.

    Returns:
        What ``score`` does.
    """
    before = {name: p._version for name, p in module.named_parameters()}
    scored = score(batch, batch_idx, size)
    changed = [name for name, p in module.named_parameters() if p._version != before[name]]
    if changed:
        raise LossCaptureError(
            f"what stands before the loss in training_step changes parameters ({', '.join(changed[:3])}), and "
            "mode='subset' runs it twice. Move it to on_train_batch_end, or use mode='partial'."
        )
    return scored


def failed_on_subset(plan: BatchPlan, error: Exception) -> LossCaptureError:
    """The error for a training step that cannot run on the first selected samples alone."""
    return LossCaptureError(
        f"training_step failed on the {counted(plan.forwarded, 'selected sample')} alone "
        f"({type(error).__name__}: {error}): perhaps it keeps a state of the full batch's size (the hidden state of "
        "a recurrent layer), or the batch is not sliced as a whole. Use mode='partial', or "
        "override SparseLossMixin.select_batch."
    )
