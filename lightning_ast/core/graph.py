"""Step 1b of a batch: what the graph of a loss says about its rows, read from autograd's own nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

__all__ = ["depends_on_samples", "picks_rows"]

_PICKING = ("IndexBackward0", "MaskedSelectBackward0")
_LAYERS = ("AddmmBackward0", "BmmBackward0", "ConvolutionBackward0", "EmbeddingBackward0")


def picks_rows(values: Tensor, batch_size: int) -> bool:
    """Whether rows were picked out of ``values`` (boolean or integer indexing) since they were one row a sample.

    Args:
        values: ``(N, ...)`` with its graph, N not the batch size.
        batch_size: B.

    Example:
        >>> import torch
        >>> x = torch.zeros(4, 3, 2, requires_grad=True)
        >>> picks_rows((2 * x).view(-1, 2), 4), picks_rows((2 * x)[torch.ones(4, 3, dtype=torch.bool)], 4)
        (False, True)
    """
    pending, seen = [values.grad_fn], set[Any]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _PICKING:
            return True
        if _leading(node) != batch_size:
            pending += [parent for parent, _ in node.next_functions]
    return False


def depends_on_samples(loss: Tensor, captured: Tensor, batch_size: int) -> bool:
    """Whether ``loss`` depends on the batch in another way than through ``captured``: by a term of its own.

    A term over parameters alone (weight decay, the divergence of weights) does not.

    Args:
        loss: scalar with its graph.
        captured: scalar of which it was made.
        batch_size: B.

    Example:
        >>> import torch
        >>> layer, x = torch.nn.Linear(2, 1), torch.ones(4, 2)
        >>> out = layer(x)
        >>> captured = out.square().mean()
        >>> penalty = layer.weight.square().sum()
        >>> depends_on_samples(captured + penalty, captured, 4), depends_on_samples(captured + out.sum(), captured, 4)
        (False, True)
    """
    if captured.grad_fn is None or loss.grad_fn is None:
        return False
    forward = set(_nodes(captured.grad_fn, without=None))
    for node in _nodes(loss.grad_fn, without=captured.grad_fn):
        rows = _leading(node)
        of_samples = rows is not None and rows >= batch_size and rows % batch_size == 0
        if of_samples and (node in forward or node.name() in _LAYERS):
            return True
    return False


def _nodes(root: Any, *, without: Any) -> Iterator[Any]:
    """The nodes of a graph, leaves left out, without one node and what lies behind it alone."""
    pending, seen = [root], {without}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        parents = [parent for parent, _ in node.next_functions]
        if parents:
            yield node
        pending += parents


def _leading(node: Any) -> int | None:
    """The leading dimension of what the node computed in the forward."""
    metadata = getattr(node, "_input_metadata", None)
    shape: Any = metadata[0].shape if metadata else ()
    return int(shape[0]) if len(shape) > 0 else None
