"""Sums, means and matrix products: over the samples they give ordinary tensors, as every parameter's gradient is.

``gradient @ weight`` has rows; ``gradient.T @ input`` sums over them, so only the selected rows of the input enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows, RowGradient, holds_rows
from lightning_ast.core.partial.registry import rule

__all__ = []


@rule("sum", "sum.dim_IntList", "mean", "mean.dim", on_rows=True)
def _reduce(
    func: OpOverload, gradient: HeldRows, dim: int | Sequence[int] | None = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    place = gradient.place
    ndim = gradient.dim()
    given = [dim] if isinstance(dim, int) else dim or range(ndim)
    dims = [d % ndim for d in given]
    rows = gradient.data_rows
    mean = func._schema.name == "aten::mean"
    if place.dim in dims:  # the other rows are zero: they add nothing
        total = rows.sum(dims, keepdim=keepdim, **kwargs)
        return total / math.prod(place.shape[d] for d in dims) if mean else total
    out = (torch.mean if mean else torch.sum)(rows, dims, keepdim=keepdim, **kwargs)
    return gradient.moved(out, place.dim if keepdim else place.dim - sum(d < place.dim for d in dims))


@rule("_softmax_backward_data", "_log_softmax_backward_data", "glu_backward", on_rows=True)
def _along_a_dimension(func: OpOverload, gradient: HeldRows, saved: Tensor, dim: int, *rest: Any) -> Any:
    """Run what works along one dimension, as long as that is not the samples'."""
    at = gradient.place.dim
    if dim % gradient.dim() == at:
        return NotImplemented
    return gradient.like(func(gradient.data_rows, gradient.rows_of(saved, at), dim, *rest))


@rule("mm", "bmm")
def _matmul(func: OpOverload, left: Any, right: Any) -> Any:
    first = type(left) is RowGradient
    gradient, other = (left, right) if first else (right, left)
    if type(other) is RowGradient or not holds_rows(gradient):
        return NotImplemented
    if other.is_conj():  # below the level of this dispatch nobody looks at the lazy bit
        other = torch.conj_physical(other.conj())
    place = gradient.place
    kept = place.from_end == (-2 if first else -1)
    if place.from_end == -3:  # one product for each row
        other = gradient.rows_of(other, 0)
        kept = True
    elif not kept:  # summed over the rows
        other = gradient.rows_of(other, other.dim() - 2 if first else other.dim() - 1)
    product = torch.mm if left.dim() == 2 else torch.bmm
    out = product(gradient.data_rows, other) if first else product(other, gradient.data_rows)
    return gradient.like(out) if kept else out


@rule("mv", "dot")
def _matvec(func: OpOverload, other: Tensor, gradient: Tensor) -> Any:
    """Multiply a matrix by a vector of rows: the product is summed over them."""
    if type(other) is RowGradient or not holds_rows(gradient):
        return NotImplemented
    return func(gradient.rows_of(other, other.dim() - 1), gradient.data_rows)
