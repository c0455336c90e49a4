"""The gate of each batch inside Lightning: what is watched in a forward, and what stands in the backward behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.callbacks._decide import Decision
from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.core.dependence import SampleTrace
from lightning_ast.core.entries import Entry, EntryError, EntryFinder, Found
from lightning_ast.core.gradient_gate import BatchGate, Execution, Kept
from lightning_ast.core.graph_batches import assignments_of
from lightning_ast.core.loss_sum import combine
from lightning_ast.core.losses import LossCapture, LossRecord
from lightning_ast.core.partial import BatchNormBackward

__all__ = ["Gating", "entry_error"]

_TRACES = 8
"""Forwards that are traced for graphs of a new form, and for a first proof, at most."""
_SAMPLES = 3
"""Samples that are followed, each through another batch, before a loss counts as independent of all of them."""


class Gating:
    """Finds where the gradient of each loss enters the network, and puts the batch's gate there.

    Args:
        module: The LightningModule.
        decision: Scores and selects.
        execution: How the rest of the backward is computed.
        batchnorm: The backward of BatchNorm in ``partial``.
        dense_ops: Counts the ops that ran over all rows.
        take: ``(batch, indices) -> batch``, the user's own way to take samples, or None.
        lost: Tells whether a loss is not finite, where that is to be known and can be told without waiting.
        enabled: Whether anything is ever selected or scored.

    Attributes:
        finder: Knows the graphs that were proved.
        labels_wanted: Whether somebody wants to know the classes of the samples.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        decision: Decision,
        *,
        execution: Execution,
        batchnorm: BatchNormBackward,
        dense_ops: Counter[str],
        take: Callable[[Any, Tensor], Any] | None,
        lost: Callable[[Tensor], bool],
        enabled: bool,
    ) -> None:
        self._module = module
        self._decision = decision
        self._execution: Execution = execution
        self._batchnorm: BatchNormBackward = batchnorm
        self._dense_ops = dense_ops
        self._take = take
        self._lost = lost
        self._wants_trace = enabled
        self._traces = 0
        self._told = set[str]()
        self._plan: BatchPlan | None = None
        self._batch: Any = None
        self._gate: BatchGate | None = None
        self._trace: SampleTrace | None = None
        self._capture: LossCapture | None = None
        self._open: list[Any] = []
        self._reached = False
        self.finder = EntryFinder()
        self.labels_wanted = False

    # ------------------------------------------------------------------ the forward

    def start_batch(self, plan: BatchPlan, batch: Any) -> None:
        """Watch what is needed of the forward that follows.

        Args:
            plan: The plan of the batch.
            batch: As the training step gets it.
        """
        self._plan = plan
        self._batch = batch
        self._reached = False
        if self.traces_next(plan.batch_size) and plan.sub_batch is None:
            self._trace = self.start_trace(batch, plan.batch_size)
            self._enter(self._trace)
        watches = self._decision.needs_losses or self.labels_wanted
        if watches and plan.sub_batch is None and (plan.is_gated or self._trace is not None):
            self._capture = LossCapture()
            self._enter(self._capture)

    def start_scoring(self, batch: Any) -> None:
        """Look at a whole batch ahead of the step, which may get a part of it."""
        self._plan = None
        self._batch = batch

    @property
    def _assignments(self) -> tuple[Tensor, ...]:
        part = None if self._plan is None else self._plan.sub_batch
        return assignments_of(self._batch if part is None else part)

    def traces_next(self, batch_size: int) -> bool:
        """Tell whether the next forward is to be traced."""
        return self._wants_trace and batch_size > 1

    def start_trace(self, batch: Any, batch_size: int) -> SampleTrace:
        """Make the trace of a forward; where a first one proved nothing, of another part of the batch."""
        attempt = self._traces
        self._traces += 1
        only = None if attempt < _SAMPLES or self.finder.proved else attempt - _SAMPLES
        return SampleTrace(batch, batch_size, take=self._take, only=only, sample=(-1 - attempt) % batch_size)

    def _enter(self, mode: Any) -> None:
        mode.__enter__()
        self._open.append(mode)

    def leave_forward(self) -> None:
        """Stop watching. Safe to call twice."""
        while self._open:
            self._open.pop().__exit__(None, None, None)

    # ------------------------------------------------------------------ the backward

    def start_backward(self, loss: Tensor) -> None:
        """Put the gate at the entries of a loss.

        Raises:
            EntryError: In the first batch, the samples' rows cannot be found in the graph of the loss.
        """
        if self._module.automatic_optimization:
            self.leave_forward()
        elif self._trace is not None:
            self._trace.paused = True
        plan = self._plan
        if plan is None or loss.grad_fn is None:
            return
        if not plan.is_gated and self._lost(loss):
            plan.leave_out = True
        found = self._found(plan, loss)
        if not found.entries:
            return
        if self._trace is not None and self._decision.needs_losses and not plan.is_gated and self._gate is None:
            self._scores(plan, loss)  # what cannot be computed must not wait for the end of the warmup
        if plan.is_gated:
            self._reached = True
            self._stand(plan, loss, found.entries)

    def _stand(self, plan: BatchPlan, loss: Tensor, entries: tuple[Entry, ...]) -> None:
        if self._gate is None:
            self._gate = BatchGate(
                plan.forwarded,
                partial(self._decide, plan),
                execution=self._execution,
                batchnorm=self._batchnorm,
                dense_ops=self._dense_ops,
            )
        by_losses = self._decision.needs_losses and plan.sub_batch is None and self._capture is not None
        if by_losses and not self._gate.decided:  # the values are known before the backward
            scores, record = self._scores(plan, loss)
            with torch.no_grad():
                self._gate.settle(self._decision.decide(plan, scores, record.losses, record.labels))
        self._gate.open(loss, entries)

    def _scores(self, plan: BatchPlan, loss: Tensor) -> tuple[Tensor, LossRecord]:
        assert self._capture is not None
        record = combine(self._capture, loss, plan.batch_size, scale=1 / self.score_scale(1))
        return self._decision.scores(plan, self._batch, record), record

    def resume_forward(self) -> None:
        """Go on watching a step that runs its own backward."""
        if self._trace is not None:
            self._trace.paused = False

    def _found(self, plan: BatchPlan, loss: Tensor) -> Found:
        if self._trace is not None:
            known = self.finder.find(loss, plan.forwarded, doubtful=False, assignments=self._assignments)
            return self.prove(loss, plan.forwarded, self._trace) if known is None else known
        return self.find(loss, plan.forwarded) if plan.is_gated else Found()

    def find(self, loss: Tensor, size: int) -> Found:
        """Find the entries of a loss of any batch but the first.

        A graph of a new form (a term that begins late) is taken by its sizes where they allow one answer, and the next
        forward is traced. Where they do not, the step is a dense one.
        """
        found = self.finder.find(loss, size, assignments=self._assignments)
        if found is None:
            found = self.finder.guess(loss, size, assignments=self._assignments)
            self._wants_trace = self._traces < _TRACES
            if found.unclear:
                return Found(unclear=found.unclear)
        return found

    def prove(self, loss: Tensor, size: int, trace: SampleTrace) -> Found:
        """Prove the entries of a loss whose forward was traced.

        Raises:
            EntryError: They cannot be found, whatever part of the batch is changed.
        """
        if trace.failure is not None:
            self._warn(f"which rows belong to which sample is taken from the sizes of tensors: {trace.failure}.")
            return self.finder.guess(loss, size, assignments=self._assignments)
        last = self._traces >= min(trace.leaves + _SAMPLES, _TRACES)
        found = self.finder.prove(loss, size, trace, last=last, assignments=self._assignments)
        failed = last and not found.entries and not self.finder.proved
        if failed and (found.unclear or self._module.automatic_optimization):
            raise entry_error(found, size)
        if found.entries and found.unclear:
            self._warn(
                f"the gradient enters {', '.join(found.unclear)} by rows that are not one or several a sample of the "
                f"{size}: there it stays that of all samples. What lies before it is trained on the selected ones."
            )
        if any(not entry.exact for entry in found.entries):
            self._warn(
                "the network mixes the samples of a batch before its last layer, so the rows of a sample depend on the "
                "others too: the selection is of rows of the gradient."
            )
        return found

    def _decide(self, plan: BatchPlan, norms: Tensor) -> Kept | None:
        if plan.sub_batch is not None:
            return self._decision.kept_of_part(plan, norms * self.score_scale(plan.forwarded))
        labels = None if self._capture is None else self._capture.labels(plan.batch_size)
        return self._decision.decide(plan, norms * self.score_scale(plan.batch_size), norms, labels)

    def score_scale(self, batch_size: int) -> Any:
        """Give what a norm is multiplied by so that it can be compared with those of other batches.

        The loss is a mean over the batch, which Lightning divides by the number of accumulated batches and multiplies
        by the loss scale of 16-bit training.
        """
        trainer = self._module.trainer
        scale: Any = float(batch_size)
        if self._module.automatic_optimization:
            scale *= trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = getattr(scaler, "_scale", None)  # get_scale() would wait for the device
        return scale if factor is None else scale / factor

    # ------------------------------------------------------------------ the end

    def finish_batch(self, plan: BatchPlan) -> None:
        """Let go of the batch.

        Raises:
            EntryError: No loss of the first batches depends on a sample in a way that could be traced.
        """
        self.leave_forward()
        if plan.is_gated and not self._reached and plan.batch_size > 1 and plan.sub_batch is None:
            self.tell_ungated(plan, traced=self._trace is not None)
        trace = self._trace
        self.close()
        if trace is not None:
            trace.release()
            most = _SAMPLES if self.finder.proved else _TRACES
            self._wants_trace = self._traces < most and (self.finder.doubts or not self.finder.proved)
            if not self.finder.proved and not self._wants_trace and trace.failure is None:
                raise entry_error(Found(), plan.batch_size)

    def tell_ungated(self, plan: BatchPlan, *, traced: bool) -> None:
        """Count a batch as a dense one, and warn of it; not where its trace is still to be judged."""
        plan.sparse = plan.leave_out = False
        if not traced:
            self._warn(
                "a training step had no loss whose gradient could be selected from, so it was a dense one: it calls "
                "`loss.backward()` instead of `self.manual_backward(loss)`, returns no loss, or its loss does not "
                "depend on the samples of the batch."
            )

    def close(self) -> None:
        """Stop watching, and hold nothing of the batch. Safe to call twice."""
        self.leave_forward()
        if self._gate is not None:
            self._gate.close()
        if self._capture is not None:
            self._capture.clear()
        self._gate = self._trace = self._capture = self._plan = self._batch = None

    def _warn(self, message: str) -> None:
        kind = message[:20]  # the sizes behind it may differ from batch to batch
        if kind not in self._told:
            self._told.add(kind)
            rank_zero_warn(f"lightning-ast: {message}")


def entry_error(found: Found, size: int) -> EntryError:
    """Make the error for a loss in whose graph the samples' rows cannot be found."""
    if found.unclear:
        problem = f"in {', '.join(found.unclear)} no dimension holds {size} samples that only change their own rows"
    else:
        problem = f"nothing in the graph of the loss was seen to depend on one of the {size} samples"
    return EntryError(
        f"expected a batch of {size} samples, each of which has rows of its own where the gradient of the loss enters "
        f"the network, but {problem}. If the batch size is another one, or the samples do not lie along the first "
        "dimension of the batch's tensors, use SparseLossMixin and override `count_samples(batch)` and "
        "`select_batch(batch, indices)`."
    )
