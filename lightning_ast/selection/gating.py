"""The gate of each batch: what is watched in the forward, and what stands in the backward behind it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import Entry, EntryFinder, Found, entry_error
from lightning_ast.core.gradient_gate import BatchGate, Kept
from lightning_ast.core.losses.capture import LossRecord
from lightning_ast.errors import EntryError, LossCaptureError
from lightning_ast.lightning_internals.fit_loop import loss_scale, runs_backward
from lightning_ast.selection.decision import Decision
from lightning_ast.selection.entry_search import EntrySearch, WarnOnce
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.step_losses import StepLosses
from lightning_ast.selection.step_state import StepState, Treatment

__all__ = ["Gating"]

_COMPILED_LOSS = (
    "expected a loss whose graph shows where its gradient enters the network, but a function that torch.compile made "
    "computes the network and the loss together. Compile the network alone (`self.net = torch.compile(net)`), and "
    "compute the loss from its output in training_step."
)


class Gating:
    """Puts the gate of a batch where the gradient of each of its losses enters the network."""

    def __init__(self, parts: FitParts, decision: Decision) -> None:
        self.decision = decision
        self._parts = parts
        self._module = parts.module
        self._finder = EntryFinder()  # shared: what one kind of forward has proved of a graph holds in the other
        self._warn = WarnOnce()
        self.search = EntrySearch(parts, self._finder, self._warn)
        self.scoring_search = EntrySearch(parts, self._finder, self._warn)
        self.labels_wanted = False
        self._step: StepState | None = None
        self._batch: Any = None
        self._gate: BatchGate | None = None
        self._trace: SampleTrace | None = None
        self._losses: StepLosses | None = None
        self._open = ExitStack()  # what watches the forward
        self._has_gated = False
        self._was_ungated = False

    def start_batch(self, step: StepState, batch: Any) -> None:
        """Watch what is needed of the forward that follows."""
        self._step = step
        self._batch = batch
        self._has_gated = False
        # What the forward gets: rows are counted against it.
        self.search.batch = batch if step.part is None else step.part.batch
        self.search.sizes = step.facts.sizes
        if self.search.wants_trace(step.forwarded):
            take = None if step.part is None else step.part.take
            self._trace = self.search.start_trace(step.forwarded, take=take)
            self._open.enter_context(self._trace)
            step.traced = True
        watches = self.decision.needs_losses or self.labels_wanted
        if watches and step.part is None and (step.is_gated or self._trace is not None):
            self._losses = StepLosses(self._module)
            self._open.enter_context(self._losses)

    def start_backward(self, loss: Tensor) -> None:
        """Put the gate at the entries of a loss."""
        # Lightning's backward comes behind the whole forward; a step that runs its own goes on with its forward.
        if self._module.automatic_optimization:
            self._open.close()
        elif self._trace is not None:
            self._trace.paused = True
        step = self._step
        if step is None or loss.grad_fn is None:
            return
        if not step.is_gated and self._parts.quarantine.lost(loss):
            step.treatment = Treatment.CLEANED
        traced = self._trace is not None
        if not traced and not step.is_gated:
            return
        found = self._found(step, loss)
        if not found.entries:
            weighs = step.counts_as_one_batch or (step.selects and step.part is not None)
            if weighs and self._parts.processes.count > 1 and not self._gate_of(step).decided:
                # The other processes wait, in their backward, to agree on a denominator with this one
                self._gate_of(step).settle(self.decision.weights.of_step(step, loss.device))
            return
        if traced and self.decision.needs_losses and not step.is_gated:
            self._scores(step, loss, found.entries)  # what cannot be computed must not wait for the end of the warmup
        if step.is_gated:
            self._has_gated = True  # a batch may have several losses; only one without any is a dense step
            self._place_gate(step, loss, found.entries)

    def _found(self, step: StepState, loss: Tensor) -> Found:
        trace = self._trace
        if trace is None:
            return self.search.find(loss, step.forwarded)
        found = self.search.find_traced(loss, step.forwarded, trace)
        if self._module.automatic_optimization:  # nothing else is proved in this step, and a trace holds much memory
            self._trace = None
            self.search.end_trace(trace)
        return found

    def _gate_of(self, step: StepState) -> BatchGate:
        if self._gate is None:
            self._gate = BatchGate(
                step.forwarded,
                partial(self._decide, step),
                execution=step.facts.execution,
                batchnorm=self._parts.settings.batchnorm,
                dense_ops=self._parts.dense_ops,
            )
        return self._gate

    def _place_gate(self, step: StepState, loss: Tensor, entries: tuple[Entry, ...]) -> None:
        gate = self._gate_of(step)
        by_losses = self.decision.needs_losses and step.part is None and self._losses is not None
        if by_losses and not gate.decided:  # the values are known before the backward
            scores, record = self._scores(step, loss, entries)
            with torch.no_grad():
                gate.settle(self.decision.decide(step, scores, record.losses, record.labels))
        gate.open(loss, entries)

    def _scores(self, step: StepState, loss: Tensor, entries: tuple[Entry, ...]) -> tuple[Tensor, LossRecord]:
        assert self._losses is not None
        _check_order(entries, step.batch_size)
        record = self._losses.combined(loss, step.batch_size, scale=1 / self._score_scale(1))
        return self.decision.scores(step, self._batch, record), record

    def _decide(self, step: StepState, norms: Tensor) -> Kept | None:
        if loss_scale(self._module.trainer) is not None:
            norms = _without_overflow(norms)
        comparable = norms * self._score_scale(step.forwarded)
        if step.part is not None:
            finite = self._parts.quarantine.finite_in_step(step, comparable)
            return self.decision.weights.of_part(step, step.part, comparable, finite)
        labels = None if self._losses is None else self._losses.labels(step.batch_size)
        return self.decision.decide(step, comparable, norms, labels)

    def _score_scale(self, batch_size: int) -> Any:
        """Return the factor that makes a norm comparable with those of other batches."""
        # The loss is a mean over the batch, which Lightning divides by the number of accumulated batches and multiplies
        # by the loss scale of 16-bit training.
        trainer = self._module.trainer
        scale: Any = float(batch_size)  # a tensor once it is divided by the loss scale: reading that would wait
        if self._module.automatic_optimization:
            scale *= trainer.accumulate_grad_batches
        factor = loss_scale(trainer)
        return scale if factor is None else scale / factor

    def resume_forward(self) -> None:
        """Go on watching a step that runs its own backward."""
        if self._trace is not None:
            self._trace.paused = False

    def finish_batch(self, step: StepState) -> None:
        """Let go of the batch."""
        self._open.close()
        if step.is_gated and not self._has_gated and step.forwarded > 1:
            self.count_ungated(step)
        trace = self._trace
        if trace is not None:
            self.search.end_trace(trace)
        self.close()
        if trace is not None and trace.failure is None and self.search.is_hopeless and not self._finder.proved:
            raise entry_error((), step.batch_size)

    def finish_fit(self) -> None:
        """Warn of a fit that ended before it came to the error that says why nothing can be selected."""
        if self._was_ungated and self.search.attempts and not self._finder.proved:
            self._warn(
                "lightning-ast: every batch was a dense one: the run ended before it could be proved which rows of the "
                "gradient belong to which sample. A longer run selects, or stops with an error that tells what to "
                "change."
            )

    def count_ungated(self, step: StepState) -> None:
        """Count a batch as a dense one, or as one of equal weights, and warn of it once no trace will follow."""
        if self._finder.proved and (self.search.is_hidden or self.scoring_search.is_hidden):
            raise EntryError(_COMPILED_LOSS)
        self._was_ungated = True
        if step.part is None:
            step.treatment = Treatment.DENSE
        is_known = self._finder.proved or (self.search.is_exhausted and not self.search.attempts)
        # With several loaders a graph of a new form is traced in the next batch, or refused.
        if is_known and not step.facts.sizes and runs_backward(self._module.trainer):
            result = "so it was a dense one" if step.part is None else "so the selected samples weigh alike"
            self._warn(
                f"lightning-ast: a training step had no loss whose gradient could be selected from, {result}: it calls "
                "`loss.backward()` instead of `self.manual_backward(loss)`, returns no loss, or its loss does not "
                "depend on the samples of the batch."
            )

    def close(self) -> None:
        """Stop watching, and hold nothing of the batch. Safe to call twice."""
        self._open.close()
        if self._gate is not None:
            self._gate.close()
        if self._losses is not None:
            self._losses.clear()
        self._gate = None
        self._trace = None
        self._losses = None
        self._step = None
        self._batch = None
        self.search.batch = None


def _check_order(entries: tuple[Entry, ...], size: int) -> None:
    """Check that the rows of a loss can be told from the samples, where scores are made of losses."""
    for place in (entry.place for entry in entries):
        outer = place.shape[0] if place.dim else place.pre
        if size > 1 and outer == size and (place.dim or place.pre > 1):
            raise LossCaptureError(
                f"the network gives a tensor of shape {place.shape} with {size} time steps (or the like) ahead of as "
                f"many samples, so the rows that a loss function is given do not show which sample each belongs to. "
                "Use significance='gradient', or a batch of another size."
            )


def _without_overflow(norms: Tensor) -> Tensor:
    """Replace the norms ``(B,)`` of samples whose gradient 16 bits cannot hold at the scale of the loss."""
    # Infinity is no fault of a sample: the scaler skips the step and lowers the scale. NaN is, unless there is infinity
    # beside it or the whole batch is NaN: then it is the difference of two infinite values. Nothing waits for that.
    overflows = norms.isinf().any() | norms.isnan().all()
    largest = torch.finfo(torch.float16).max
    return torch.where(overflows, norms.nan_to_num(nan=largest, posinf=largest), norms)
