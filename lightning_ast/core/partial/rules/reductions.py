"""Sums and means: over the samples they give ordinary tensors, which is how every parameter's gradient comes out."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_ast.core.partial.registry import rule

__all__ = []


@rule("sum", "sum.dim_IntList", "mean", "mean.dim", on_rows=True)
def _reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient = args[0]
    place = gradient.place
    ndim = gradient.dim()
    dims = args[1] if len(args) > 1 and args[1] is not None else ()
    dims = [d % ndim for d in ([dims] if isinstance(dims, int) else dims)] or list(range(ndim))
    keep = args[2] if len(args) > 2 else kwargs.pop("keepdim", False)
    rows = gradient.data_rows
    mean = func._schema.name == "aten::mean"
    if place.dim in dims:  # the other rows are zero: they add nothing
        total = rows.sum(dims, keepdim=keep, **kwargs)
        return total / math.prod(place.shape[d] for d in dims) if mean else total
    out = (torch.mean if mean else torch.sum)(rows, dims, keepdim=keep, **kwargs)
    return gradient.moved(out, place.dim if keep else place.dim - sum(d < place.dim for d in dims))


@rule("_softmax_backward_data", "_log_softmax_backward_data", "glu_backward", on_rows=True)
def _along_a_dimension(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what works along one dimension, as long as that is not the samples'."""
    gradient, saved, dim, *rest = args
    at = gradient.place.dim
    if dim % gradient.dim() == at:
        return NotImplemented
    return gradient.like(func(gradient.data_rows, gradient.rows_of(saved, at), dim, *rest))
