"""The user's training step with the loss of a selection in place of the batch's: interception, not replacement.

The instance's ``training_step`` (and ``per_sample_loss``, where the module brings one) is wrapped for the length of the
fit. A dense batch goes straight through. For a sparse one the wrapper slices the batch (``subset``) or lets the
losses decide (``mask``, ``partial``), and hands the user's code a loss whose value is the full batch's and whose
gradient is the selection's.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.core.execution import denominator, report_full_loss, selected_loss
from lightning_ast.core.gate import Selection, Weighting
from lightning_ast.core.losses import REMEDY, LossCapture, LossCaptureError, LossRecord, check_losses

__all__ = ["StepInterceptor"]

Decide = Callable[[Any, Tensor, LossRecord | None], Selection]
Keep = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class StepInterceptor:
    """Wraps a module's training step for the length of a fit.

    Args:
        module: the LightningModule.
        explicit: whether it brings its own ``per_sample_loss``.
        scored: whether sparse batches are scored before the step, and the step sees the selected samples alone.
        weighting: importance weights of the selection.
        keep: ``(losses (B,), indices (k,), factors (k,) or None) -> (B,)``, zero where not selected: how ``mask`` and
            ``partial`` differ.
        decide: ``(batch, losses, record) -> Selection``, for ``mask`` and ``partial``.
        score: ``(batch, losses, record) -> (B,)``, for batches that are observed. Also called on the first batch where
            it is a dense one, so that a score that cannot be computed fails there and not when the sparse stage begins.
        average: mean of a scalar over the processes that train together.
        forward_context: entered around the first call of the user's step, for measurements.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        *,
        explicit: bool,
        scored: bool,
        weighting: Weighting,
        keep: Keep,
        decide: Decide,
        score: Callable[[Any, Tensor, LossRecord | None], Tensor],
        average: Callable[[Tensor], Tensor],
        forward_context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._forward_context = forward_context
        self._module = module
        self._scored = scored
        self._weighting = weighting
        self._keep = keep
        self._decide = decide
        self._score = score
        self._average = average
        self._installed = False
        self._verified = False
        self._inside = False
        self.training_step: Callable[..., Any] = module.training_step
        self.per_sample_loss: Callable[..., Any] | None = getattr(module, "per_sample_loss", None) if explicit else None
        self.plan: BatchPlan | None = None

    def install(self) -> None:
        """Put the wrappers on the instance."""
        self._replaced = {name: self._module.__dict__.get(name) for name in ("training_step", "per_sample_loss")}
        self._put("training_step", _method(self._module, "training_step", self.training_step, self._run))
        if self.per_sample_loss is not None:
            method = _method(self._module, "per_sample_loss", self.per_sample_loss, self._intercept_explicit)
            self._put("per_sample_loss", method)
        self._installed = True

    def remove(self) -> None:
        """Take the wrappers off; the instance is as it was. Safe to call twice."""
        if self._installed:
            for name, value in self._replaced.items():
                if value is not None:
                    self._put(name, value)
                else:
                    self._module.__dict__.pop(name, None)
        self._installed, self.plan = False, None

    def _put(self, name: str, value: Any) -> None:
        self._module.__dict__[name] = value

    def _run(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.plan
        if plan is None or (self._verified and not plan.sparse and plan.observe is None):
            return self.training_step(batch, *args, **kwargs)
        if plan.sub_batch is not None:
            batch = plan.sub_batch
        plan.seen.clear()
        self._inside = True
        try:
            with self._forward_context():
                output = self._watched(plan, batch, *args, **kwargs)
        finally:
            self._inside = False
        if not self._verified and plan.seen:
            self._verify(output, plan.seen[0])
        plan.seen.clear()
        return output

    def _watched(self, plan: BatchPlan, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.per_sample_loss is not None:
            output = self.training_step(batch, *args, **kwargs)
            if len(plan.seen) != 1:
                raise LossCaptureError(
                    "the module defines `per_sample_loss`: training_step must call it once and train on its mean, "
                    f"`loss = self.per_sample_loss(batch, batch_idx).mean()`. It called it {len(plan.seen)} times."
                )
            return output
        rewrite = functools.partial(self._rewrite, plan, batch)
        with LossCapture(plan.forwarded, rewrite=rewrite, detached=not plan.sparse) as capture:
            output = self.training_step(batch, *args, **kwargs)
        if output is None and not capture.records and self._module.automatic_optimization:
            plan.sparse = False  # the step skips this batch
            return output
        record = capture.record()  # raises where there was not exactly one
        if self._scored:
            self._check_scorable(plan, record, capture.passed_over)
        return output

    @staticmethod
    def _check_scorable(plan: BatchPlan, record: LossRecord, passed_over: int) -> None:
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
                f"the selected samples have {record.elements} loss elements each where the whole batch had "
                f"{plan.elements}: the batch was not sliced as a whole. Use SparseLossMixin and override "
                "`select_batch(batch, indices)`."
            )

    def _rewrite(self, plan: BatchPlan, batch: Any, record: LossRecord, compute: Callable[[], Tensor]) -> Tensor:
        """Captured losses: the reduced loss of the selection, reporting the full batch's value."""
        if not plan.sparse:
            value = compute()
        else:
            if plan.selection is None:
                plan.selection = self._decide(batch, record.losses.detach(), record)
            kept, counts, full, total = plan.selection, record.counts, record.total.detach(), record.counts.sum()
            if plan.sub_batch is None:
                divisor = self._divisor(kept, counts[kept.indices], total, mean=record.mean)
                selected = self._keep(record.sums, kept.indices, kept.weights).sum() / divisor
            else:
                if plan.full_loss is not None and plan.total_count is not None:
                    full, total = plan.full_loss, plan.total_count
                divisor = self._divisor(kept, counts, total, mean=record.mean)
                selected = selected_loss(record.sums, kept, divisor)
            value = report_full_loss(selected.to(record.dtype), full.to(record.dtype))
        self._watch(plan, batch, record.losses.detach(), record)
        plan.seen.append(value)
        return value

    def _watch(self, plan: BatchPlan, batch: Any, losses: Tensor, record: LossRecord | None) -> None:
        if plan.observe is not None:
            observe, plan.observe = plan.observe, None  # once a batch, also where the optimizer evaluates it often
            observe(self._score(batch, losses, record))
        elif not plan.sparse and not self._verified:
            self._score(batch, losses, record)

    def _intercept_explicit(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Explicit losses: scaled row by row, so that the user's own mean has the selection's gradient."""
        assert self.per_sample_loss is not None
        plan = self.plan
        if not self._inside or plan is None:
            result: Tensor = self.per_sample_loss(batch, *args, **kwargs)
            return result
        size = plan.forwarded
        with LossCapture(size, unreduced=True) as capture:
            losses = check_losses(self.per_sample_loss(batch, *args, **kwargs), size)
        record = capture.records[0] if len(capture.records) == 1 else None
        self._watch(plan, batch, losses.detach(), record)
        if plan.sparse:
            losses = self._scaled(plan, batch, losses, record)
        plan.seen.append(losses)
        return losses

    def _scaled(self, plan: BatchPlan, batch: Any, losses: Tensor, record: LossRecord | None) -> Tensor:
        if plan.selection is None:
            plan.selection = self._decide(batch, losses.detach(), record)
        kept = plan.selection
        ones = torch.ones_like(kept.indices, dtype=losses.dtype)
        total = torch.full((), float(plan.batch_size), dtype=losses.dtype, device=losses.device)
        factors = (ones if kept.weights is None else kept.weights.to(losses.dtype)) * losses.numel()
        factors = factors / self._divisor(kept, ones, total, mean=True)
        if plan.sub_batch is None:
            return report_full_loss(self._keep(losses, kept.indices, factors), losses)
        full = losses if plan.full_loss is None else plan.full_loss.to(losses.dtype).expand_as(losses)
        return report_full_loss(losses * factors, full)

    def _divisor(self, selection: Selection, counts: Tensor, total: Tensor, *, mean: bool) -> Tensor:
        """The denominator over all processes, as each one's share: DDP's average then weights every sample alike."""
        return self._average(denominator(counts, selection, self._weighting, total_count=total, mean=mean))

    def _verify(self, output: Any, seen: Tensor) -> None:
        """Once: what was intercepted must be what is trained on, and explicit losses must be averaged."""
        loss = output.get("loss") if isinstance(output, dict) else output
        if self._module.automatic_optimization and isinstance(loss, Tensor) and loss is not seen:
            share = None
            if loss.requires_grad and seen.requires_grad:
                (share,) = torch.autograd.grad(loss.sum(), seen, retain_graph=True, allow_unused=True)
            if share is None:
                raise LossCaptureError(
                    f"the loss that training_step returns does not depend on the one that was captured. {REMEDY}"
                )
            if self._scored and seen.numel() > 1 and bool((share == 1).all()):
                raise LossCaptureError(
                    "training_step sums its per-sample losses. In mode='subset' it sees fewer of them: train on their "
                    "mean, `self.per_sample_loss(batch, batch_idx).mean()`, or use mode='mask'."
                )
        self._verified = True


def _method(
    module: pl.LightningModule, name: str, original: Callable[..., Any], replacement: Callable[..., Any]
) -> types.MethodType:
    """``replacement`` as a method with the name and signature of ``original``, which Lightning inspects.

    A copy of the module that is made within the fit, or a pickled one, has its class's own method.
    """

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs) if self is module else getattr(type(self), name)(self, *args, **kwargs)

    functools.update_wrapper(call, original)
    call.__name__ = name
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    rest = inspect.signature(original).parameters.values()
    call.__signature__ = inspect.Signature([first, *rest])  # type: ignore[attr-defined]
    return types.MethodType(call, module)
