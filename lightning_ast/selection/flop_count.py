"""The FLOPs of one batch, counted as its step runs."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_ast.core.entries.node_facts import runs_compiled
from lightning_ast.core.ledger import FlopsPerSample, Ledger
from lightning_ast.core.partial.flops import BackwardFlops, compiled_parts, uncounted
from lightning_ast.selection.step_state import StepState

__all__ = ["DenseOps", "FlopCount"]

# Batches that are counted in the hope that something is trained on, or that an op runs over all rows once more.
_TRIES = 3


@dataclass(frozen=True)
class DenseOps:
    """What ran over all rows in the backward of one batch."""

    calls: Counter[str]
    share: float | None = 0.0  # of the backward's FLOPs, in [0, 1]; None where that is not counted
    settled: bool = True  # else the share is going to be counted in one of the next batches


class FlopCount:
    """Counts forward and backward of the first batch that is trained on, by watching; results are unchanged."""

    def __init__(self, module: nn.Module, *, enabled: bool = True) -> None:
        self._counts = enabled and not compiled_parts(module)
        # Two things are wanted: the cost of a dense step, from the first batch, and the share that runs over all rows,
        # from the first sparse backward of each kind.
        self._wants_dense = self._counts
        self._wants_share = self._counts
        self._open = ExitStack()
        self._in_forward = False
        self._tries = _TRIES
        self._counter = BackwardFlops()
        self._counting_now = False
        self._has_counted = False
        self._backward_began: int | None = None
        self._backward_full = 0
        self._forward: int | None = None
        self._backward: int | None = None
        self._expects_backward = False
        self._calls: Counter[str] = Counter()
        self._shares: dict[frozenset[str], float] = {frozenset(): 0.0}
        self._seen: Counter[frozenset[str]] = Counter()
        if enabled and not self._counts:  # the ops of fused kernels are not seen
            rank_zero_info("lightning-ast: FLOPs of compiled modules are not counted: no ast/savings_flops.")

    def start_forward(self) -> None:
        """Begin to count a forward, once; backwards inside it (manual optimization) are counted as such."""
        self._in_forward = self._wants_dense and self._forward is None
        self._expects_backward = self._in_forward
        if self._in_forward:
            self._start()

    def stop_forward(self) -> None:
        """End the forward's count. Safe to call twice."""
        if self._in_forward:
            self._in_forward = False
            self._stop()
            self._forward = self._counter.full - self._backward_full

    def _start(self) -> None:
        if not self._counting_now:
            self._open.enter_context(self._counter)
            self._counting_now = self._has_counted = True

    def _stop(self) -> None:
        self._counting_now = False
        self._open.close()

    def start_backward(self, step: StepState | None, loss: Tensor) -> None:
        """Begin to count a backward, if that of this batch is to be counted."""
        partial = step is not None and step.may_spare_rows
        if not ((self._wants_dense and self._expects_backward) or (partial and self._wants_share)):
            return
        self._start()
        self._backward_began = self._counter.full
        if runs_compiled(loss):
            self._counter.failure = "the step calls a function that torch.compile made"

    def stop_backward(self) -> None:
        """End the backward's count."""
        if self._backward_began is None:
            return
        full = self._counter.full - self._backward_began
        self._backward_began = None
        if not self._in_forward:
            self._stop()
        self._backward_full += full
        if self._wants_dense and self._expects_backward:
            self._backward = full + (self._backward or 0)
        if self._forward is not None:  # the backward of the counted step, not of the optimizer's next evaluation
            self._expects_backward = False

    def of_sample(self, step: StepState) -> FlopsPerSample | None:
        """Return the FLOPs of one sample, as counted in this batch; None where nothing, or not all, was counted."""
        counted = self._wants_dense and not step.is_void and self._counter.failure is None
        if not counted or not step.forwarded or not self._forward or self._backward is None:
            return None
        return FlopsPerSample(self._forward / step.forwarded, self._backward / step.forwarded)

    def finish_batch(self, ledger: Ledger, step: StepState, dense_ops: Counter[str]) -> DenseOps:
        """Write the cost of one sample to the ledger, once known; return what ran over all rows for want of a rule."""
        self.close()
        executed = self._finish_count(ledger, step) if self._wants_dense or self._has_counted else None
        if not step.has_spared_rows:  # a gradient of 0 runs over all rows
            return DenseOps(Counter())
        if uncounted(dense_ops):
            ledger.flops = None
        return self._dense_ops(dense_ops, executed, step.selected / step.batch_size)

    def _finish_count(self, ledger: Ledger, step: StepState) -> float | None:
        """Take what was counted in a batch; return the share of the backward's FLOPs that was run, if known."""
        self._has_counted = False
        if self._wants_dense and ledger.flops is None:
            ledger.flops = self.of_sample(step)
        counter = self._counter
        full = self._backward_full
        self._counter = BackwardFlops()
        self._backward_full = 0
        # Where a sample was followed through the forward, that may be what failed: the next batch is not traced.
        hindered = step.traced and counter.failure is not None
        if self._wants_dense and counter.failure is not None and not hindered:
            self._counts = self._wants_share = False
            rank_zero_warn(
                f"lightning-ast: FLOPs are not counted, and there are no ast/savings_flops: {counter.failure}. "
                "Training is not affected; SparseSelectionCallback(count_flops=False) does not try."
            )
        self._tries -= self._forward is not None
        if self._counts and self._tries > 0 and (step.is_void or hindered or self._backward is None):
            self._forward = None  # the next batch tells what one costs
            self._backward = None
        else:
            self._wants_dense = False
        if counter.executed is None or counter.failure is not None or not full:
            return None
        return 1 + (counter.executed - counter.full) / full  # the forward runs at full shapes: only this differs

    def _dense_ops(self, dense_ops: Counter[str], executed: float | None, rate: float) -> DenseOps:
        # The backward was counted twice over: by the full shapes that autograd sees, and by the rows that are computed.
        # The quotient tells what ran over all rows for want of a rule. Where other ops than before did, it is counted
        # once more.
        calls = dense_ops - self._calls
        self._calls = dense_ops.copy()
        kind = frozenset(calls)
        if executed is not None and self._wants_share:
            self._shares[kind] = min(max((executed - rate) / (1 - rate), 0.0), 1.0)
        self._seen[kind] += 1
        self._wants_share = self._counts and kind not in self._shares and self._seen[kind] <= _TRIES
        share = None if uncounted(kind) else self._shares.get(kind)
        return DenseOps(calls, share, settled=not self._wants_share)

    def close(self) -> None:
        """Stop counting wherever an exception left it."""
        self._in_forward = False
        self._stop()
