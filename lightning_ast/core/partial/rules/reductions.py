"""Sums, matrix products and attention: over the samples they give ordinary tensors, as every parameter's gradient is.

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
from lightning_ast.core.partial.registry import positional, rule

__all__ = []

_SAVED = ("query", "key", "value", "out", "logsumexp")
_MASKS = ("attn_bias", "attn_mask")


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
    # Python's own bindings are faster to call than the dispatcher's.
    product = torch.mm if left.dim() == 2 else torch.bmm
    out = product(gradient.data_rows, other) if first else product(other, gradient.data_rows)
    return gradient.like(out) if kept else out


@rule("mv", "dot")
def _matvec(func: OpOverload, other: Tensor, gradient: Tensor) -> Any:
    """Multiply a matrix by a vector of rows: the product is summed over them."""
    if type(other) is RowGradient or not holds_rows(gradient):
        return NotImplemented
    return func(gradient.rows_of(other, other.dim() - 1), gradient.data_rows)


@rule(
    "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_fused_attention_overrideable_backward", on_rows=True,
)  # fmt: skip
def _attention(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run a fused attention's backward; the written-out form is made of matrix products and a softmax."""
    gradient: HeldRows = args[0]
    # The backends give their arguments in different orders, and some have arguments that others lack.
    names = positional(func)
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    # Heads lie behind the samples or before them. Dropout draws its mask anew, by the row's position in the batch.
    at = gradient.place.dim
    if at > 1 or call.get("dropout_p"):
        return NotImplemented
    size = gradient.place.size
    mask_has_rows = False
    for name in (*_SAVED, *_MASKS):
        saved = call.get(name)
        if not isinstance(saved, Tensor) or saved.numel() == 0:
            continue
        if saved.dim() > at and saved.shape[at] == size and (name in _SAVED or saved.dim() == 4):
            call[name] = gradient.rows_of(saved, at)
            mask_has_rows |= name in _MASKS  # a mask that is broadcast over the batch is the same for all rows
        elif name in _SAVED:
            return NotImplemented
    call[names[0]] = gradient.packed()
    in_order = [call.pop(name) for name in names if name in call]
    outs = func(*in_order, **call)
    rows = 3 + mask_has_rows  # gradients of query, key, value and, of a mask with a row for each sample, its own
    return tuple(gradient.moved(o, at) if isinstance(o, Tensor) and i < rows else o for i, o in enumerate(outs))
