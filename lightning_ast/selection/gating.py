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

from lightning_ast.core.batch.graphs import Assignments, assignments_of
from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import Entry, EntryFinder, Found
from lightning_ast.core.gradient_gate import BatchGate, Execution, Kept
from lightning_ast.core.losses.capture import LossRecord
from lightning_ast.core.partial import BatchNormBackward
from lightning_ast.errors import EntryError
from lightning_ast.lightning_internals.step_facts import loss_scale, runs_backward
from lightning_ast.selection.checks import check_order
from lightning_ast.selection.decision import Decision
from lightning_ast.selection.step_losses import StepLosses
from lightning_ast.selection.step_state import BatchPlan
from lightning_ast.selection.traces import Traces

__all__ = ["Gating", "entry_error"]


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
        scoring_traces: Decides which scoring passes of ``subset`` are traced.
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
        self._lost = lost
        self._traces = Traces(take, enabled=enabled)
        self.scoring_traces = Traces(take, enabled=enabled)
        self._unclear: tuple[str, ...] = ()
        self._told = set[str]()
        self._plan: BatchPlan | None = None
        self._batch: Any = None
        self._gate: BatchGate | None = None
        self._trace: SampleTrace | None = None
        self._capture: StepLosses | None = None
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
        if self._traces.wanted(plan.forwarded):
            if plan.sub_batch is None:
                self._trace = self._traces.start(batch, plan.forwarded)
            else:
                take = partial(self._decision.take_again, plan, batch)
                self._trace = self._traces.start(plan.sub_batch, plan.forwarded, take=take)
            self._enter(self._trace)
            plan.traced = True
        watches = self._decision.needs_losses or self.labels_wanted
        if watches and plan.sub_batch is None and (plan.is_gated or self._trace is not None):
            self._capture = StepLosses(self._module)
            self._enter(self._capture)

    def start_scoring(self, batch: Any) -> None:
        """Look at a whole batch ahead of its step, which may get a part of it."""
        self._plan = None
        self._batch = batch

    @property
    def _assignments(self) -> Assignments:
        part = None if self._plan is None else self._plan.sub_batch
        return assignments_of(self._batch if part is None else part)

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
        traced = self._trace is not None
        found = self._found(plan, loss)
        if not found.entries:
            if plan.sparse and plan.sub_batch is not None and self._decision.is_shared:
                self._take_part(plan, loss)
            return
        if traced and self._decision.needs_losses and not plan.is_gated:
            self._scores(plan, loss, found.entries)  # what cannot be computed must not wait for the end of the warmup
        if plan.is_gated:
            self._reached = True
            self._stand(plan, loss, found.entries)

    def _gate_of(self, plan: BatchPlan) -> BatchGate:
        if self._gate is None:
            self._gate = BatchGate(
                plan.forwarded,
                partial(self._decide, plan),
                execution=self._execution,
                batchnorm=self._batchnorm,
                dense_ops=self._dense_ops,
            )
        return self._gate

    def _take_part(self, plan: BatchPlan, loss: Tensor) -> None:
        """Agree with the other processes on a denominator, for which they wait in their backward."""
        gate = self._gate_of(plan)
        if not gate.decided:
            gate.settle(self._decision.kept(plan, loss.device))

    def _stand(self, plan: BatchPlan, loss: Tensor, entries: tuple[Entry, ...]) -> None:
        gate = self._gate_of(plan)
        by_losses = self._decision.needs_losses and plan.sub_batch is None and self._capture is not None
        if by_losses and not gate.decided:  # the values are known before the backward
            scores, record = self._scores(plan, loss, entries)
            with torch.no_grad():
                gate.settle(self._decision.decide(plan, scores, record.losses, record.labels))
        gate.open(loss, entries)

    def _scores(self, plan: BatchPlan, loss: Tensor, entries: tuple[Entry, ...]) -> tuple[Tensor, LossRecord]:
        assert self._capture is not None
        check_order((entry.place for entry in entries), plan.batch_size)
        record = self._capture.record(loss, plan.batch_size, scale=1 / self.score_scale(1))
        return self._decision.scores(plan, self._batch, record), record

    def resume_forward(self) -> None:
        """Go on watching a step that runs its own backward."""
        if self._trace is not None:
            self._trace.paused = False

    def _found(self, plan: BatchPlan, loss: Tensor) -> Found:
        trace = self._trace
        if trace is None:
            return self.find(loss, plan.forwarded, self._traces) if plan.is_gated else Found()
        found = self.finder.find(loss, plan.forwarded, assignments=self._assignments)
        if found is None:
            found = self.prove(loss, plan.forwarded, trace, self._traces)
        else:
            self._traces.note_proof(proved=bool(found.entries))
        if self._module.automatic_optimization:  # nothing else is proved in this step, and a trace holds much memory
            self._trace = None
            self._traces.end(trace)
        return found

    def find(self, loss: Tensor, size: int, traces: Traces) -> Found:
        """Find the entries of a loss of any batch but the first.

        A graph of a new form (a term that begins late) is taken by its sizes where they allow one answer, and the next
        forward is traced. Where they do not, the step is a dense one.
        """
        found = self.finder.find(loss, size, assignments=self._assignments)
        if found is None:
            found = self.finder.guess(loss, size, assignments=self._assignments)
            traces.note_new_form()
            if found.unclear:
                return Found(unclear=found.unclear)
        return found

    def prove(self, loss: Tensor, size: int, trace: SampleTrace, traces: Traces) -> Found:
        """Prove the entries of a loss whose forward was traced.

        Raises:
            EntryError: They cannot be found, whatever part of the batch is changed.
        """
        if trace.failure is not None:
            self._warn(f"which rows belong to which sample is taken from the sizes of tensors: {trace.failure}.")
            return self.finder.guess(loss, size, assignments=self._assignments)
        apart = not self._module.automatic_optimization
        found = self.finder.prove(loss, size, trace, may_be_apart=apart, assignments=self._assignments)
        traces.note_proof(proved=bool(found.entries))
        if not found.entries and not self.finder.proved:
            self._unclear = self._unclear or found.unclear
            if traces.is_last(trace) and (found.unclear or self._module.automatic_optimization):
                raise entry_error(self._unclear, size)
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
            return self._decision.kept_of_subset(plan, norms * self.score_scale(plan.forwarded))
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
        factor = loss_scale(trainer)
        return scale if factor is None else scale / factor

    # ------------------------------------------------------------------ the end

    def finish_batch(self, plan: BatchPlan) -> None:
        """Let go of the batch.

        Raises:
            EntryError: No loss of the first batches depends on a sample in a way that could be traced.
        """
        self.leave_forward()
        if plan.is_gated and not self._reached and plan.forwarded > 1:
            self.tell_ungated(plan)
        trace = self._trace
        if trace is not None:
            self._traces.end(trace)
        self.close()
        if trace is not None and trace.failure is None and self._traces.hopeless and not self.finder.proved:
            raise entry_error((), plan.batch_size)

    def tell_ungated(self, plan: BatchPlan) -> None:
        """Count a batch as a dense one, or as one of equal weights, and warn of it once that cannot be otherwise."""
        if plan.sub_batch is None:
            plan.sparse = plan.leave_out = False
        is_known = self.finder.proved or (self._traces.exhausted and not self._traces.attempts)
        if is_known and runs_backward(self._module.trainer):
            result = "so it was a dense one" if plan.sub_batch is None else "so the selected samples weigh alike"
            self._warn(
                f"a training step had no loss whose gradient could be selected from, {result}: it calls "
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


def entry_error(unclear: tuple[str, ...], size: int) -> EntryError:
    """Make the error for a loss in whose graph the samples' rows cannot be found."""
    if unclear:
        problem = f"in {', '.join(unclear)} no dimension holds {size} samples that only change their own rows"
    else:
        problem = f"nothing in the graph of the loss was seen to depend on one of the {size} samples"
    hidden = " What a step takes out of tensors by `numpy()`, `tolist()` or `item()` cannot be followed: use tensors."
    return EntryError(
        f"expected a batch of {size} samples, each of which has rows of its own where the gradient of the loss enters "
        f"the network, but {problem}. If the batch size is another one, or the samples do not lie along the first "
        "dimension of the batch's tensors, use SparseLossMixin and override `count_samples(batch)` and "
        f"`select_batch(batch, indices)`.{'' if unclear else hidden}"
    )
