"""The user's training step with the loss of a selection in place of the batch's: interception, not replacement.

The instance's ``training_step`` (and ``per_sample_loss``, where the module brings one) is wrapped for the length of the
fit. A dense batch goes straight through. For a sparse one the wrapper slices the batch (``subset``) or lets the
losses decide (``mask``, ``partial``), and hands the user's code a loss whose value is the full batch's and whose
gradient is the selection's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ast.callbacks._checks import check_scorable, failed_on_subset
from lightning_ast.callbacks._decide import Decision
from lightning_ast.callbacks._loss_use import UseOfLosses
from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.callbacks._wrap import method_of
from lightning_ast.core.execution import denominator, report_full_loss, selected_loss
from lightning_ast.core.gate import Selection
from lightning_ast.core.losses import LossCapture, LossCaptureError, LossRecord, check_losses, mean_without
from lightning_ast.words import counted

__all__ = ["StepInterceptor"]

Keep = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class StepInterceptor:
    """Wraps a module's training step for the length of a fit.

    Args:
        module: the LightningModule.
        decision: scores and selects. A first dense batch is scored too, so that a score that cannot be computed fails
            there and not when the sparse stage begins.
        explicit: whether it brings its own ``per_sample_loss``.
        scored: whether sparse batches are scored before the step, and the step sees the selected samples alone.
        keep: ``(losses (B,), indices (k,), factors (k,) or None) -> (B,)``, zero where not selected: how ``mask`` and
            ``partial`` differ.
        keep_finite: the same for batches with samples that are not finite: those must not enter the backward at all.
        divisor: ``(own, scale) -> shared``: from a batch's own denominator and the scale of the user's to the one that
            all share, over the processes and over the batches whose gradients are accumulated.
        forward_context: entered around the first call of the user's step, for measurements.

    Attributes:
        plan: of the running batch; None: the step is the user's own.
        reports_full_loss: whether the loss has the full batch's value, or, for an optimizer that compares the values
            which the closure returns (LBFGS), that of the selection, whose gradient it has.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        decision: Decision,
        *,
        explicit: bool,
        scored: bool,
        keep: Keep,
        keep_finite: Keep,
        divisor: Callable[[Tensor, Tensor], Tensor],
        forward_context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._decision = decision
        self._quarantine = decision.quarantine
        self._forward_context = forward_context
        self._module = module
        self._scored = scored
        self._keep = keep
        self._keep_finite = keep_finite
        self._common_divisor = divisor
        self._installed = False
        self._use = UseOfLosses(module, explicit=explicit, scored=scored)
        self._inside = self._sliced = self._troubled = False
        self.training_step: Callable[..., Any] = module.training_step
        self.per_sample_loss: Callable[..., Any] | None = getattr(module, "per_sample_loss", None) if explicit else None
        self.plan: BatchPlan | None = None
        self.reports_full_loss = True

    def install(self) -> None:
        """Put the wrappers on the instance."""
        self._replaced = {name: self._module.__dict__.get(name) for name in ("training_step", "per_sample_loss")}
        self._put("training_step", method_of(self._module, "training_step", self.training_step, self._run))
        if self.per_sample_loss is not None:
            method = method_of(self._module, "per_sample_loss", self.per_sample_loss, self._intercept_explicit)
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

    @property
    def verified(self) -> bool:
        """Whether a first batch has been through, and was found to be usable."""
        return self._use.verified

    def check_backward(self, loss: Tensor) -> None:
        """Check how a manual step uses its own losses, ahead of its first backward."""
        self._use.check_backward(self.plan, loss)

    def _put(self, name: str, value: Any) -> None:
        self._module.__dict__[name] = value

    def _run(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.plan
        if plan is None:
            return self.training_step(batch, *args, **kwargs)
        if plan.sub_batch is not None or plan.batch is not None:
            batch = plan.batch if plan.sub_batch is None else plan.sub_batch
        if not plan.sparse and plan.known_bad:
            plan.sparse = plan.leave_out = True
        if self.verified and not plan.sparse and plan.observe is None and not self._watches_dense():
            output = self.training_step(batch, *args, **kwargs)
            return self._voided(plan, output) if self._quarantine.lost(output) else output
        return self._intercepted(plan, batch, *args, **kwargs)

    def _watches_dense(self) -> bool:
        """Whether the losses of dense steps are looked at one by one, which no step runs twice for.

        Where it costs nothing (explicit losses), where a step trains itself (manual optimization), and from the first
        dense loss on that was not finite.
        """
        if self._quarantine.limit is None or self._module.device.type != "cpu":
            return False
        return self._troubled or self.per_sample_loss is not None or not self._module.automatic_optimization

    def _voided(self, plan: BatchPlan, output: Any) -> Any:
        """A dense step whose loss is not finite, nobody knows for which sample: it has a gradient of zero."""
        self._troubled = plan.void = plan.lost = True
        nothing = self._nothing()
        return {**output, "loss": nothing} if isinstance(output, dict) else nothing

    def _intercepted(self, plan: BatchPlan, batch: Any, *args: Any, **kwargs: Any) -> Any:
        plan.seen.clear()
        self._inside = True
        try:
            with self._forward_context():
                output = self._watched(plan, batch, *args, **kwargs)
        except (LossCaptureError, KeyboardInterrupt):
            raise
        except Exception as error:
            if plan.sub_batch is None or self._sliced:
                raise
            raise failed_on_subset(plan, error) from error
        finally:
            self._inside = False
        self._use.check_step(plan, output)
        plan.seen.clear()
        self._sliced = self._sliced or plan.sub_batch is not None
        return output

    def _watched(self, plan: BatchPlan, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.per_sample_loss is not None:
            output = self.training_step(batch, *args, **kwargs)
            if len(plan.seen) != 1:
                raise LossCaptureError(
                    "the module defines `per_sample_loss`: training_step must call it once and train on its mean, "
                    "`loss = self.per_sample_loss(batch, batch_idx).mean()`. "
                    f"It called it {counted(len(plan.seen), 'time')}."
                )
            return output
        rewrite = functools.partial(self._rewrite, plan, batch)
        with LossCapture(plan.forwarded, rewrite=rewrite, detached=not plan.sparse) as capture:
            output = self.training_step(batch, *args, **kwargs)
        if output is None and self._module.automatic_optimization:
            if capture.records and not self.verified:
                raise LossCaptureError("training_step computes a loss and returns None: let it return the loss.")
            if not capture.records:
                plan.sparse = False  # the step skips this batch
                return output
        record = capture.record()  # raises where there was not exactly one
        if self._scored:
            check_scorable(plan, record, capture.passed_over)
        return output

    def _rewrite(
        self,
        plan: BatchPlan,
        batch: Any,
        record: LossRecord,
        compute: Callable[[], Tensor],
        graded: Callable[[], LossRecord],
    ) -> Tensor:
        """Captured losses: the reduced loss of the selection, reporting the full batch's value."""
        losses = record.losses.detach()
        if not plan.sparse and self._leaves_out(plan, losses):
            record = graded()
        value = self._reduced(plan, batch, losses, record) if plan.sparse else compute()
        self._watch(plan, batch, losses, record)
        plan.seen.append(value)
        return value

    def _reduced(self, plan: BatchPlan, batch: Any, losses: Tensor, record: LossRecord) -> Tensor:
        kept, counts, mean = self._choose(plan, batch, losses, record), record.counts, record.mean
        whole = record.without(plan.bad) if plan.sub_batch is None else record
        full, total = whole.total.detach(), whole.counts.sum()
        if plan.sub_batch is None:
            divisor = self._divisor(plan, counts[kept.indices], total, mean=mean)
            selected = self._keeper(plan)(record.sums, kept.indices, kept.weights).sum() / divisor
        else:
            if plan.full_loss is not None and plan.total_count is not None:
                full, total = plan.full_loss, plan.total_count
            divisor = self._divisor(plan, counts, total, mean=mean)
            selected = selected_loss(record.sums, kept, divisor)
        if plan.void:
            return self._nothing().to(record.dtype)
        return self._reported(selected.to(record.dtype), full.to(record.dtype))

    def _reported(self, selected: Tensor, full: Tensor) -> Tensor:
        return report_full_loss(selected, full) if self.reports_full_loss else selected

    def _choose(self, plan: BatchPlan, batch: Any, losses: Tensor, record: LossRecord | None) -> Selection:
        """The selection of a batch, which is made once; never with a sample that is not finite."""
        if plan.selection is None and not plan.leave_out:
            self._decision.select(plan, batch, losses, record)
        elif plan.leave_out or plan.stands_for is not None:
            everything = Selection(torch.arange(plan.batch_size, device=losses.device))
            eligible = self._quarantine.eligible(plan, losses)
            if eligible is not None or plan.selection is None:
                plan.select((plan.selection or everything).among(eligible))
        assert plan.selection is not None
        return plan.selection

    def _leaves_out(self, plan: BatchPlan, losses: Tensor) -> bool:
        """Whether a batch that was to be trained on as a whole must do without some of its samples.

        On an accelerator that is not asked in a dense epoch, whose steps wait for nothing.
        """
        eligible = self._quarantine.eligible(plan, losses)
        if losses.device.type != "cpu" and plan.offered == plan.batch_size:
            return False
        plan.sparse = plan.leave_out = eligible is not None and not bool(eligible.all())
        return plan.sparse

    def _keeper(self, plan: BatchPlan) -> Keep:
        """Zeros in a full backward do not silence NaN: where there is one, the backward is over the selected rows."""
        return self._keep_finite if plan.leave_out or plan.known_bad else self._keep

    def _nothing(self) -> Tensor:
        """A loss with a gradient of zero for every parameter, so that DDP's processes stay in step."""
        return torch.stack([p.sum() * 0.0 for p in self._module.parameters() if p.requires_grad]).sum()

    def _watch(self, plan: BatchPlan, batch: Any, losses: Tensor, record: LossRecord | None) -> None:
        if plan.observe is not None:
            observe, plan.observe = plan.observe, None  # once a batch, also where the optimizer evaluates it often
            score = self._decision.scores(plan, batch, losses, record)
            plan.note(score, None if record is None else record.labels)
            if plan.bad is not None:
                score = score.where(~plan.bad.to(score.device), torch.full_like(score, torch.inf))
            observe(score)
        elif not plan.sparse and not self.verified:
            self._decision.scores(plan, batch, losses, record)

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
        if plan.sparse or self._leaves_out(plan, losses.detach()):
            scaled = self._scaled(plan, batch, losses, record)
        else:
            scaled = losses
        self._watch(plan, batch, losses.detach(), record)
        plan.seen.append(scaled)
        return scaled

    def _scaled(self, plan: BatchPlan, batch: Any, losses: Tensor, record: LossRecord | None) -> Tensor:
        kept = self._choose(plan, batch, losses.detach(), record)
        ones = torch.ones_like(kept.indices, dtype=losses.dtype)
        total = losses.new_tensor(float(plan.batch_size)) if plan.bad is None else (~plan.bad).sum().to(losses)
        factors = (ones if kept.weights is None else kept.weights.to(losses.dtype)) * losses.numel()
        factors = factors / self._divisor(plan, ones, total, mean=True)
        if plan.void:
            return torch.zeros_like(losses) + self._nothing().to(losses.dtype)
        if plan.sub_batch is None:
            reported = losses
            if plan.bad is not None:  # what is left out takes the mean of the others, so that theirs is reported
                reported = losses.where(~plan.bad.to(losses.device), mean_without(losses, plan.bad))
            return self._reported(self._keeper(plan)(losses, kept.indices, factors), reported)
        full = losses if plan.full_loss is None else plan.full_loss.to(losses.dtype).expand_as(losses)
        return self._reported(losses * factors, full)

    def _divisor(self, plan: BatchPlan, counts: Tensor, total: Tensor, *, mean: bool) -> Tensor:
        """The common denominator, as each process's share: DDP's average then weights every sample alike."""
        assert plan.selection is not None
        if plan.leave_out:  # a dense batch: no other process or micro-batch knows of it
            return denominator(counts, Selection(plan.selection.indices), "none", total_count=total, mean=mean)
        one = torch.ones_like(total)
        if plan.void:
            own = torch.zeros_like(total)
        else:
            own = denominator(
                counts, plan.selection, self._decision.weighting, total_count=total.where(total > 0, one), mean=mean
            )
        return self._common_divisor(own, total if mean else one)
