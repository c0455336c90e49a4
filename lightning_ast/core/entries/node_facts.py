"""Step 3, what a node tells of itself and of its rows: its kind, its sizes, what it was computed from.

Nothing is run to find this out, and no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_ast.core.dependence.records import shape_of

__all__ = [
    "OPAQUE",
    "PICKING",
    "PRODUCTS",
    "RESHAPING",
    "Edge",
    "below_ddp",
    "edges_of",
    "form_of",
    "is_layer",
    "is_leaf",
    "nodes_below",
    "rows_are_picked",
    "rows_in_order",
    "runs_compiled",
]

# Nodes are told apart by how their names begin: "View" stands for ViewBackward0, ViewBackward1 and so on.
PRODUCTS = (
    *("Addmm", "Addmv", "Addbmm", "Baddbmm", "Bilinear", "Bmm", "Convolution"),
    *("Embedding", "Linear", "Mm", "Mv", "Prelu"),
)
"""Layers even where their parameter has a single element; other nodes with one are a temperature or a loss weight."""
_PARTS = ("Rnn", "Conv", "Norm")
OPAQUE = ("CheckpointFunction", "CompiledFunction", "DifferentiableGraph")
"""Nodes that hide their parameters."""
PICKING = ("Embedding", "Index", "Gather", "Take")
"""Nodes that pick rows of a parameter by data, which their edges do not show."""
_VIEWS = ("View", "UnsafeView", "ReshapeAlias")
RESHAPING = (*_VIEWS, "Squeeze", "Unsqueeze", "Transpose", "TBackward", "Permute", "ToCopy", "Alias")
"""Nodes that give a tensor another shape or type."""
_ARRANGING = (
    *RESHAPING,
    *("Cat", "Stack", "Expand", "Repeat", "AsStrided", "Unfold", "Select", "Slice", "Split", "Unbind", "IndexSelect"),
)
"""Nodes that keep all rows of each sample, or the same ones of each."""
_BY_VALUES = ("IndexBackward", "MaskedSelect")
"""Nodes whose number of rows may depend on values."""
_JOINING = ("Cat", "Stack")
_DDP_SINK = "_DDPSinkBackward"

Edge = tuple[Node, int]
"""A node, and the position of one of its outputs."""


def edges_of(node: Node) -> list[Edge]:
    """List what a node was computed from, as far as that has a graph."""
    return [(child, output_nr) for child, output_nr in node.next_functions if child is not None]


def form_of(node: Node) -> str:
    """Name a node without the number of its overload, which may be another one under a trace."""
    return node.name().rstrip("0123456789")


def is_leaf(node: Node) -> bool:
    """Tell whether a node stands for a tensor that nothing computed, such as a parameter."""
    return node.name() == "torch::autograd::AccumulateGrad"


def is_layer(name: str) -> bool:
    """Tell whether a node of this name is a layer, and not a step of a loss."""
    return name.startswith(PRODUCTS) or any(part in name for part in _PARTS)


def _row_count(node: Node, output_nr: int = 0) -> int | None:
    """Return the leading dimension of what a node computed; None where it has none or the graph does not tell."""
    shape = shape_of(node, output_nr)
    return shape[0] if shape else None


def _picks_rows(node: Node) -> bool:
    """Tell whether a node picks by values along the first dimension; a masked selection picks from all of them."""
    indices = getattr(node, "_saved_indices", None)
    return node.name().startswith(_BY_VALUES) and (indices is None or (len(indices) > 0 and indices[0] is not None))


def _each_once(pending: list[Node]) -> Iterator[Node]:
    """Yield the nodes of a list, the last first and each once; the caller adds to the list meanwhile."""
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen:  # a graph has many ways to one node: a walk of each would take for ever
            seen.add(node)
            yield node


def nodes_below(roots: list[Node]) -> Iterator[Node]:
    """List what the given nodes are computed from, without themselves unless one leads to another."""
    pending = [child for root in roots for child, _ in edges_of(root)]
    for node in _each_once(pending):
        yield node
        pending += [child for child, _ in edges_of(node)]


def rows_in_order(values: Tensor, batch_size: int) -> bool:
    """Tell whether the rows ``(N, ...)`` that a loss is given lie with the samples outermost, as the graph shows it.

    ``view(-1, C)`` of ``(B, T, C)`` gives such rows. An index, a mask, a join along the batch, or flattening with
    another dimension first (time, ensembles) does not.
    """
    # The rows are followed back to where there was one a sample. Rows that are flattened from the first layer on, and
    # values without a graph, are taken to lie with the samples outermost.
    rows = values.shape[0]
    pending = [] if values.grad_fn is None else [values.grad_fn]
    for node in _each_once(pending):
        if _picks_rows(node):
            return False
        if _row_count(node) == batch_size:  # one row a sample, of which all rows above were made in order
            continue
        if node.name().startswith(_JOINING) and getattr(node, "_saved_dim", None) == 0:
            return False
        parents = [parent for parent, _ in edges_of(node) if parent.next_functions]
        if node.name().startswith(_VIEWS) and any(_row_count(p) not in (None, 1, rows, batch_size) for p in parents):
            return False
        # Parents with another number of rows say nothing of these: weights, or constants that are broadcast.
        pending += [parent for parent in parents if _row_count(parent) in (rows, batch_size)]
    return True


def rows_are_picked(node: Node, output_nr: int, *, is_constant: Callable[[Node, int], bool]) -> bool:
    """Tell whether the rows of a node's output were picked or made one by one, as masked tokens and proposals are.

    Edges that ``is_constant`` tells of are made without the samples.
    """
    # Their number differs from sample to sample, also where it happens to be a multiple of the batch size. Rows are
    # followed back to where there was another number of them: a reshape or a join keeps all rows of each sample.
    rows = _row_count(node, output_nr)
    pending = [node]
    for current in _each_once(pending):
        edges = [edge for edge in edges_of(current) if edge[0].next_functions and not is_constant(*edge)]
        same = [edge[0] for edge in edges if _row_count(*edge) == rows]
        # Where no parent has so many rows, they began here: by an arrangement of whole samples, or one by one.
        if _picks_rows(current):
            return True
        if not same and edges and not current.name().startswith((*_ARRANGING, *OPAQUE)):
            return True
        pending += same
    return False


def runs_compiled(loss: Tensor) -> bool:
    """Tell whether a function that ``torch.compile`` made lies between the parameters and a loss."""
    root = [] if loss.grad_fn is None else [loss.grad_fn]
    return any(node.name().startswith("CompiledFunction") for node in (*root, *nodes_below(root)))


def below_ddp(loss: Tensor) -> tuple[Tensor | GradientEdge, Tensor | None]:
    """Return where to differentiate a loss from, and its gradient that arrives there; None for a gradient of one."""
    node: Any = loss.grad_fn
    entered = 0
    while node is not None and node.name() != _DDP_SINK:
        parents = edges_of(node)
        node, entered = parents[0] if len(parents) == 1 else (None, 0)
    if node is None:
        return loss, None
    # DDP passes what the step returns through a node of its own. With static_graph=True the first backward of that node
    # arranges the exchange of the gradients, so it must not run before the real backward: what stands above it is
    # differentiated by itself.
    (seed,) = torch.autograd.grad(loss, [GradientEdge(node, entered)], retain_graph=True)
    return GradientEdge(*node.next_functions[entered]), seed
