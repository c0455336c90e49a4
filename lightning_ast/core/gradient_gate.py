"""Step 4 of a batch, in its backward: score the samples where the gradient enters the network, and gate their rows.

The norm of a sample's rows of that gradient is its significance: for softmax cross-entropy it is EL2N (arXiv
2107.07075), for every other loss the gradient-norm score of Katharopoulos and Fleuret (arXiv 1803.00942). The rest of
the backward gets the rows of the selected samples alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from lightning_ast.core.entries.finder import Entry
from lightning_ast.core.entries.layout import row_norms, spread
from lightning_ast.core.entries.node_facts import below_ddp
from lightning_ast.core.partial.gradient import wrap
from lightning_ast.core.partial.memory import densify
from lightning_ast.core.partial.rows import BatchNormBackward, Place, Rows, UnequalPlace

__all__ = ["BatchGate", "Execution", "Kept", "norms_at"]

Execution = Literal["mask", "partial"]
Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Kept:
    """What the gate lets through.

    Attributes:
        indices: ``(k,)`` int64 positions of the selected samples, ascending; none stops the whole gradient.
        factors: ``(k,)`` factors of the rows of each, or None for 1.
        rows_only: Whether the other samples must not enter the backward at all, as where they are not finite: zeros
            times infinity are not zero.
    """

    indices: Tensor
    factors: Tensor | None = None
    rows_only: bool = False


def norms_at(
    loss: Tensor, edges: Sequence[GradientEdge], places: Sequence[Place], *, weight: float = 1.0
) -> Tensor | None:
    """Take the norms ``(B,)`` of the samples' rows of a loss's gradient, times ``weight``, over places of its graph.

    The graph is kept. Return None where no gradient arrives.
    """
    root, seed = below_ddp(loss)
    seed = (torch.ones_like(loss) if seed is None else seed) * weight
    gradients = torch.autograd.grad(root, edges, seed, retain_graph=True, allow_unused=True)
    norms = [row_norms(g, place) for g, place in zip(gradients, places, strict=True) if g is not None]
    if len(norms) < 2:
        return norms[0] if norms else None
    together: Tensor = torch.stack([norm.to(norms[0].device) for norm in norms]).norm(dim=0)
    return together


class BatchGate:
    """The gate of one batch: one selection for all its losses, entries and backward calls.

    Args:
        batch_size: The number of samples B of the batch.
        decide: A function that is called once, with the norms ``(B,)`` of the samples' rows; it returns what is kept,
            or None to let the whole gradient through (to watch).
        execution: ``"partial"`` computes the rest of the backward over the selected rows, ``"mask"`` over all rows,
            of which the others are zero.
        batchnorm: The backward of BatchNorm, as in :func:`lightning_ast.core.select_rows`.
        dense_ops: The counter of dense ops, as in :func:`lightning_ast.core.select_rows`.

    Attributes:
        decided: Whether the selection was made.
        kept: The selection, or None.
    """

    def __init__(
        self,
        batch_size: int,
        decide: Callable[[Tensor], Kept | None],
        *,
        execution: Execution = "partial",
        batchnorm: BatchNormBackward = "selected",
        dense_ops: Counter[str] | None = None,
    ) -> None:
        self._batch_size = batch_size
        self._decide = decide
        self._execution = execution
        self._batchnorm: BatchNormBackward = batchnorm
        self._dense_ops: Counter[str] = Counter() if dense_ops is None else dense_ops
        self._gated: set[tuple[Node, int]] = set()
        self._handles: list[RemovableHandle] = []
        self._rows: Rows | None = None
        self._dense_factors: Tensor | None = None
        self.decided = False
        self.kept: Kept | None = None

    def settle(self, kept: Kept | None) -> None:
        """Use a selection that was made elsewhere."""
        self.decided = True
        self.kept = kept

    def open(self, loss: Tensor, entries: Iterable[Entry]) -> None:
        """Put the gate at the entries of a loss, a scalar with its graph, until its backward is over.

        Where there are several, the gradient at those that the network's own gradient does not reach is computed first
        (which runs the loss part of the backward twice), and all of these decide together.
        """
        # Several losses of a step may share entries: a gradient must not be gated twice, which would weigh it twice.
        new = [entry for entry in entries if (entry.node, entry.output_nr) not in self._gated]
        if not self.decided and len(new) > 1:
            # The gradient at a nested entry holds what comes through the network too, which is not the loss part's.
            outer = [entry for entry in new if not entry.nested] or new
            norms = norms_at(loss, [GradientEdge(e.node, e.output_nr) for e in outer], [e.place for e in outer])
            if norms is not None:
                self._settle(norms)
        if self.decided and self._lets_all_through():
            return
        for entry in new:
            self._gated.add((entry.node, entry.output_nr))
            if not entry.nested:
                change = partial(self._changed, position=entry.output_nr, place=entry.place)
                self._handles.append(entry.node.register_prehook(change))
                continue
            # The network's own gradient arrives at this node too and must pass: stand at the loss's edges to it.
            for node, position in entry.edges:
                change = partial(self._changed, position=position, place=entry.place)
                self._handles.append(node.register_hook(change))

    def close(self) -> None:
        """Remove the gate, and let go of the batch's graphs."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gated.clear()
        self._rows = None

    # ------------------------------------------------------------------ the decision

    def _settle(self, norms: Tensor) -> None:
        with torch.no_grad():
            self.settle(self._decide(norms.detach()))

    def _lets_all_through(self) -> bool:
        kept = self.kept
        return kept is None or (kept.factors is None and kept.indices.numel() == self._batch_size)

    # ------------------------------------------------------------------ in the backward

    def _changed(self, gradients: Gradients, _: Gradients = (), *, position: int, place: Place) -> Gradients | None:
        """Gate one of a node's gradients; return None where all stay as they are, as torch's hooks ask for it.

        They are what arrives at the node (in a pre-hook), or what it hands on (in a hook).
        """
        gradient = gradients[position]
        if gradient is None:
            return None
        plain = densify(gradient)  # it may hold rows alone already, where something above it has selected
        if not self.decided:
            self._settle(row_norms(plain, place))
        if self._lets_all_through():
            return None
        assert self.kept is not None
        gated = self._gate(plain, place, self.kept)
        return (*gradients[:position], gated, *gradients[position + 1 :])

    def _gate(self, gradient: Tensor, place: Place, kept: Kept) -> Tensor:
        nothing = kept.indices.numel() == 0
        by_rows = (self._execution == "partial" or kept.rows_only) and kept.indices.numel() < self._batch_size
        if by_rows and isinstance(place, UnequalPlace):  # a RowGradient needs equal numbers of rows a sample
            self._dense_ops["rows of graphs"] += 1
            by_rows = False
        if nothing or not by_rows or torch.is_grad_enabled():  # a second derivative is wanted: an ordinary gradient
            factors = spread(self._factors_of_all(kept), place).to(gradient)
            return (gradient * factors).masked_fill_(factors == 0, 0)  # NaN times 0 would stay NaN
        rows = self._rows_of(kept)
        data = rows.gather(gradient, place.dim, place.pre, place.post)
        if kept.factors is not None:
            data = data * spread(kept.factors.to(data), place)
        return wrap(data, rows, place)

    def _rows_of(self, kept: Kept) -> Rows:
        # One object for each backward: what it has gathered is of no use in the next.
        task = torch._C._current_graph_task_id()
        if self._rows is None or self._rows.graph_task != task:
            self._rows = Rows(kept.indices, self._batch_size, batchnorm=self._batchnorm, dense_ops=self._dense_ops)
            Variable._execution_engine.queue_callback(self._rows.forget)
        return self._rows

    def _factors_of_all(self, kept: Kept) -> Tensor:
        """Return the factors of all samples, ``(B,)``: 0 for those that are not selected."""
        if self._dense_factors is None:
            factors = torch.ones_like(kept.indices, dtype=torch.float32) if kept.factors is None else kept.factors
            if kept.indices.numel() < self._batch_size:
                factors = factors.new_zeros(self._batch_size).index_add_(0, kept.indices, factors)
            self._dense_factors = factors
        return self._dense_factors
