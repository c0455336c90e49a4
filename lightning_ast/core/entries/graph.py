"""Step 1b of a batch: what the graph of a loss says about its rows, read from autograd's own nodes.

Nothing is run for it, and no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_ast.core.entries.node_facts import OPAQUE, nodes_below

__all__ = ["RowOrder", "below_ddp", "row_order", "rows_are_picked", "runs_compiled"]

RowOrder = Literal["samples", "picked", "joined"]

_PICKING = ("IndexBackward0", "MaskedSelectBackward0")
_JOINING = ("CatBackward0", "StackBackward0")
_ARRANGING = (
    *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "TBackward", "Permute"),
    *("Cat", "Stack", "Expand", "Repeat", "AsStrided", "Unfold", "Select", "Slice", "Split", "Unbind", "IndexSelect"),
)
_DDP_SINK = "_DDPSinkBackward"
_RESHAPING = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0")


def row_order(values: Tensor, batch_size: int) -> RowOrder:
    """How the rows ``(N, ...)`` that a loss is given came from B samples, as far as the graph tells.

    Followed back to where there was one row a sample. Rows that are flattened from the first layer on, and values
    without a graph, are taken as samples outermost.

    Args:
        values: ``(N, ...)`` with its graph, N not the batch size.
        batch_size: B.

    Returns:
        ``"samples"``: samples outermost, as ``view(-1, C)`` of ``(B, T, C)`` gives; ``"picked"``: by an index or mask;
        ``"joined"``: several tensors along the batch, or flattened with another dimension first (time, ensembles).

    Example:
        >>> import torch
        >>> x = 2 * torch.zeros(4, 3, 2, requires_grad=True)
        >>> row_order(x.view(-1, 2), 4), row_order(x[x[..., 0] == 0], 4), row_order(x.transpose(0, 1).reshape(-1, 2), 4)
        ('samples', 'picked', 'joined')
    """
    rows = values.shape[0]
    pending, seen = [values.grad_fn], set[Any]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _PICKING and _picks_first(node):
            return "picked"
        if _leading(node) == batch_size:
            continue
        if node.name() in _JOINING and _saved_dim(node) == 0:
            return "joined"
        parents = [parent for parent, _ in node.next_functions if parent is not None and parent.next_functions]
        if node.name() in _RESHAPING and any(_leading(p) not in (None, 1, rows, batch_size) for p in parents):
            return "joined"
        pending += [p for p in parents if _leading(p) in (rows, batch_size)]
    return "samples"


def rows_are_picked(node: Any, output_nr: int, *, is_constant: Callable[[Any, int], bool]) -> bool:
    """Tell whether the rows of a node's output were picked or made one by one, as masked tokens and proposals are.

    Their number differs from sample to sample, also where it happens to be a multiple of the batch size. Rows are
    followed back to where there was another number of them: a reshape or a join keeps all rows of each sample.

    Args:
        node: A node of the graph.
        output_nr: The position of its output.
        is_constant: ``(node, output_nr) -> bool``, whether an output is made without the samples.

    Example:
        >>> import torch
        >>> x = 2 * torch.zeros(4, 3, 2, requires_grad=True)
        >>> flat, picked = x.view(-1, 2).exp(), x[x[..., 0] == 0].exp()
        >>> [rows_are_picked(t.grad_fn, 0, is_constant=lambda *_: False) for t in (flat, picked)]
        [False, True]
    """
    rows = _leading(node, output_nr)
    pending, seen = [node], set[Any]()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        name = current.name()
        edges = [(child, nr) for child, nr in current.next_functions if child is not None and child.next_functions]
        edges = [edge for edge in edges if not is_constant(*edge)]
        same = [child for child, nr in edges if _leading(child, nr) == rows]
        if name.startswith(_PICKING) and _picks_first(current):
            return True
        if not same and edges and not name.startswith((*_ARRANGING, *OPAQUE)):
            return True
        pending += same
    return False


def runs_compiled(loss: Tensor) -> bool:
    """Whether a function that ``torch.compile`` made lies between the parameters and a loss."""
    root = loss.grad_fn
    nodes = () if root is None else (root, *nodes_below([root]))
    return any(node.name().startswith("CompiledFunction") for node in nodes)


def _picks_first(node: Any) -> bool:
    """Whether the first dimension is indexed (a masked selection picks from all)."""
    indices = getattr(node, "_saved_indices", None)
    return indices is None or (len(indices) > 0 and indices[0] is not None)


def _leading(node: Any, output_nr: int = 0) -> int | None:
    """The leading dimension of what the node computed in the forward; None where that is not known."""
    metadata = getattr(node, "_input_metadata", None)
    shape: Any = metadata[output_nr].shape if metadata and output_nr < len(metadata) else ()
    return int(shape[0]) if len(shape) > 0 else None


def _saved_dim(node: Any) -> int | None:
    """The dimension along which tensors were joined (autograd keeps it unsigned: a negative one is large)."""
    dim = getattr(node, "_saved_dim", None)
    return dim if isinstance(dim, int) else None


def below_ddp(loss: Tensor) -> tuple[Tensor | GradientEdge, Tensor | None]:
    """Give where to differentiate from, and the gradient of ``loss`` that arrives there; None for one.

    DDP passes what the step returns through a node of its own. With ``static_graph=True`` its first backward arranges
    the exchange of the gradients: it must not run before the real one.
    """
    node: Any = loss.grad_fn
    entered = 0
    while node is not None and node.name() != _DDP_SINK:
        parents = [edge for edge in node.next_functions if edge[0] is not None]
        node, entered = parents[0] if len(parents) == 1 else (None, 0)
    if node is None:
        return loss, None
    (seed,) = torch.autograd.grad(loss, [GradientEdge(node, entered)], retain_graph=True)
    return GradientEdge(*node.next_functions[entered]), seed
