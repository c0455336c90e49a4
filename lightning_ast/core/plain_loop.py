"""Steps 1 to 6 of a batch in a loop without Lightning: one call before ``loss.backward()``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.batch.graphs import Assignments, assignments_of
from lightning_ast.core.batch.samples import batch_size_of
from lightning_ast.core.dependence.order import OrderedTrace
from lightning_ast.core.entries.finder import EntryFinder, entry_error
from lightning_ast.core.gate import Selection
from lightning_ast.core.gradient_gate import BatchGate, Execution, Kept
from lightning_ast.core.partial.rows import BatchNormBackward
from lightning_ast.core.selector import SampleSelector

__all__ = ["GradientGate"]


class GradientGate:
    """Selects the samples of each batch where the gradient of the loss enters the network.

    For plain loops, Fabric and other trainers. Under Lightning, :class:`lightning_ast.SparseSelectionCallback` does
    this and more. The loss may be of any form; it is not changed, and neither is the forward.

    Args:
        selector: The selector of samples; it is given the norm of their rows of the gradient, times the batch size.
        execution: ``"partial"`` computes the rest of the backward over the selected rows, ``"mask"`` over all rows,
            of which the others are zero.
        batchnorm: The backward of BatchNorm, as in :func:`lightning_ast.core.select_rows`.
        average: A function that averages a tensor over the processes that train together; None for a single process.

    Attributes:
        selection: The samples selected from the last batch whose backward has run, or None. With a target coverage, a
            batch may be kept whole.
        dense_ops: The names of the backward ops that ran over all rows, and how often.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> gate = GradientGate(SampleSelector(target_activation_rate=0.5))
        >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
        >>> with gate.trace((x, y)):  # the first batch alone is traced
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        >>> gate.open(loss, batch_size=8)
        >>> loss.backward()
        >>> gate.selection.indices.numel()
        4
    """

    def __init__(
        self,
        selector: SampleSelector,
        *,
        execution: Execution = "partial",
        batchnorm: BatchNormBackward = "selected",
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._selector = selector
        self._execution: Execution = execution
        self._batchnorm: BatchNormBackward = batchnorm
        self._average = average
        self._finder = EntryFinder()
        self._assignments: Assignments = ()
        self._trace: OrderedTrace | None = None
        self._gate: BatchGate | None = None
        self.selection: Selection | None = None
        self.dense_ops: Counter[str] = Counter()

    @contextmanager
    def trace(self, batch: Any, batch_size: int | None = None) -> Iterator[None]:
        """Follow one sample through the first forward, to prove which rows of the gradient belong to which sample.

        Later calls do nothing, except for a batch of graphs: each tells which nodes and edges belong to which graph.
        Without it the sizes of tensors decide, where they allow one answer.

        Args:
            batch: Any nesting of tensors, as the forward gets it.
            batch_size: The number of samples B of the batch; None counts them.
        """
        self._assignments = assignments_of(batch)
        if self._finder.proved:
            yield
            return
        self._trace = OrderedTrace(batch, batch_size_of(batch) if batch_size is None else batch_size)
        with self._trace:
            yield

    def open(self, loss: Tensor, *, batch_size: int) -> None:
        """Put the gate at the entries of a loss whose backward follows.

        Args:
            loss: A scalar with its graph, a mean or a sum over the samples.
            batch_size: The number of samples B of the batch.

        Raises:
            EntryError: The samples' rows cannot be found in the graph of the loss.
        """
        self.close()
        found = self._finder.locate(loss, batch_size, self._trace, assignments=self._assignments)
        # A later batch whose forward is not announced must not get the nodes of this one's graphs.
        self._assignments = ()
        if self._trace is not None:  # it holds tensors of the whole forward, and the backward needs memory
            self._trace.release()
            self._trace = None
        if not found.entries:
            remedy = "Run the first forward in `with gate.trace(batch):`, or check batch_size."
            raise entry_error(found.unclear, batch_size, remedy=remedy)
        self._gate = BatchGate(
            batch_size, self._decide, execution=self._execution, batchnorm=self._batchnorm, dense_ops=self.dense_ops
        )
        self._gate.open(loss, found.entries)

    def close(self) -> None:
        """Let go of the last batch and its graph; :meth:`open` does so too. Safe to call twice."""
        if self._gate is not None:
            self._gate.close()
            self._gate = None

    def _decide(self, norms: Tensor) -> Kept | None:
        size = norms.numel()
        finite = norms.isfinite()
        # A mean divides the gradients by B: without this factor a short last batch would look more significant.
        scores = (norms * size).nan_to_num(0.0, 0.0, 0.0)
        eligible = None if bool(finite.all()) else finite  # a sample with a NaN gradient is never selected
        kept = self._selector.select(scores, eligible=eligible, average=self._average)
        self.selection = kept
        weights = torch.ones_like(kept.indices, dtype=scores.dtype) if kept.weights is None else kept.weights.to(scores)
        total = weights.sum()
        if self._selector.weighting == "unbiased":  # weights 1/p need no normaliser but the number of samples
            total = finite.sum().to(scores)
        if self._average is not None:  # one denominator for all: DDP averages gradients, not sums over samples
            total = self._average(total)
        if self._selector.is_whole and eligible is None and float(total) == size:
            return None  # the plain step
        return Kept(kept.indices, weights * size / total, rows_only=eligible is not None)
