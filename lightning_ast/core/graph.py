"""Step 1b of a batch: what the graph of a loss says about its rows, read from autograd's own nodes.

Nothing is run for it, and no device is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

__all__ = ["RowOrder", "averages", "depends_on_samples", "row_order", "runs_compiled"]

RowOrder = Literal["samples", "picked", "joined"]

_PICKING = ("IndexBackward0", "MaskedSelectBackward0")
_JOINING = ("CatBackward0", "StackBackward0")
_RESHAPING = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0")
_LAYERS = (
    "AddmmBackward0",
    "BmmBackward0",
    "BaddbmmBackward0",
    "ConvolutionBackward0",
    "EmbeddingBackward0",
    "EmbeddingBagBackward0",
    "NativeBatchNormBackward0",
    "CudnnBatchNormBackward0",
    "NativeLayerNormBackward0",
    "NativeGroupNormBackward0",
    "MkldnnRnnLayerBackward0",
    "CudnnRnnBackward0",
    "LinearBackward0",
    "MkldnnLinearBackward0",
    "CompiledFunctionBackward",
)
_PRODUCTS = ("MmBackward0",)
_MEANS = ("MeanBackward0", "MeanBackward1")
_SCALING = ("MulBackward0", "DivBackward0")
_ELEMENTWISE = (
    *_RESHAPING,
    "AddBackward0",
    "AliasBackward0",
    "NegBackward0",
    "PermuteBackward0",
    "RsubBackward1",
    "SliceBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "SubBackward0",
    "ToCopyBackward0",
    "UnsqueezeBackward0",
)
"""What changes all elements of a tensor alike and keeps their number."""


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


def depends_on_samples(loss: Tensor, captured: Tensor, batch_size: int) -> bool:
    """Whether ``loss`` depends on the batch in another way than through ``captured``: by a term of its own.

    That is told by layers that worked on a row a sample (or several); a term that is made of the batch without any
    layer is not seen. A term over parameters alone (weight decay, the divergence of weights) has none.

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
        name, rows = node.name(), _leading(node)
        layer = name in _LAYERS or (name in _PRODUCTS and (node in forward or _multiplies_data(node)))
        if layer and rows is not None and rows >= batch_size and rows % batch_size == 0:
            return True
    return False


def runs_compiled(loss: Tensor) -> bool:
    """Whether a function that ``torch.compile`` made lies between the parameters and a loss."""
    return any(node.name().startswith("CompiledFunction") for node in _nodes(loss.grad_fn, without=None))


def averages(loss: Tensor, losses: Tensor) -> bool:
    """Whether ``loss`` depends on ``losses`` through their plain mean alone, as far as the graph tells.

    Args:
        loss: scalar with its graph.
        losses: ``(B,)`` of which it was made.

    Example:
        >>> import torch
        >>> losses = 2 * torch.ones(4, requires_grad=True)
        >>> averages(0.5 * losses[:, None].mean() + 1, losses), averages(losses.sum() / 64, losses)
        (True, False)
        >>> averages((losses * torch.rand(4)).mean(), losses), averages(losses.mean() + losses.max(), losses)
        (False, False)
    """
    goal, pending, seen = losses.grad_fn, [loss.grad_fn], set[Any]()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is goal:
            return False
        mean = node.name() in _MEANS and _elements(node) == 1
        if not (mean and _alike(node, goal, losses.numel())):
            pending += [parent for parent, _ in node.next_functions]
    return True


def _alike(mean: Any, goal: Any, size: int) -> bool:
    """Whether a mean is taken over the elements of ``goal``, each of them changed as the others are."""
    pending, seen = [parent for parent, _ in mean.next_functions], {None, goal}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        scales = node.name() in _SCALING and any(
            isinstance(saved := getattr(node, name, None), Tensor) and saved.ndim == 0
            for name in ("_saved_self", "_saved_other")
        )
        if (scales or node.name() in _ELEMENTWISE) and _elements(node) == size:
            pending += [parent for parent, _ in node.next_functions]
        elif goal in _nodes(node, without=None):
            return False
    return True


def _elements(node: Any) -> int | None:
    """How many elements the node computed in the forward; None where that is not known."""
    metadata = getattr(node, "_input_metadata", None)
    return math.prod(metadata[0].shape) if metadata else None


def _nodes(root: Any, *, without: Any) -> Iterator[Any]:
    """The nodes of a graph, without one node and what lies behind it alone."""
    pending, seen = [root], {without}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending += [parent for parent, _ in node.next_functions]


def _picks_first(node: Any) -> bool:
    """Whether the first dimension is indexed (a masked selection picks from all)."""
    indices = getattr(node, "_saved_indices", None)
    return indices is None or (len(indices) > 0 and indices[0] is not None)


def _multiplies_data(node: Any) -> bool:
    """Whether a matrix product has a left factor that nothing was learned for."""
    left = getattr(node, "_saved_self", None)
    return isinstance(left, Tensor) and not left.requires_grad


def _leading(node: Any) -> int | None:
    """The leading dimension of what the node computed in the forward; None where that is not known."""
    metadata = getattr(node, "_input_metadata", None)
    shape: Any = metadata[0].shape if metadata else ()
    return int(shape[0]) if len(shape) > 0 else None


def _saved_dim(node: Any) -> int | None:
    """The dimension along which tensors were joined (autograd keeps it unsigned: a negative one is large)."""
    dim = getattr(node, "_saved_dim", None)
    return dim if isinstance(dim, int) else None
