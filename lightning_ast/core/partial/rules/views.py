"""Ops that move, split and join dimensions: the rows move with them.

A reshape may fold the samples into another dimension, ``(B, T, C)`` to ``(B * T, C)``: ``pre`` and ``post`` of the
place remember how.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows, RowGradient, holds_rows, wrap
from lightning_ast.core.partial.registry import rule
from lightning_ast.core.partial.rows import Place, place_of

__all__ = []


@lru_cache(maxsize=8192)
def _reshaped(place: Place, shape: tuple[int, ...], batch_size: int) -> tuple[Place, tuple[int, ...]] | None:
    """Find the place of ``place.shape`` viewed as ``shape``, and the view's shape with -1 in the place of the rows."""
    old = place.shape
    new = list(shape)
    if math.prod(old) == 0:
        return None
    if -1 in new:
        new[new.index(-1)] = math.prod(old) // -math.prod(new)
    # One of the new dimensions has to hold all samples whole; what lies outside and inside them may be split or joined.
    outside = math.prod(old[: place.dim]) * place.pre
    inside = math.prod(old[place.dim + 1 :]) * place.post
    for dim, size in enumerate(new):
        before = math.prod(new[:dim])
        after = math.prod(new[dim + 1 :])
        if outside % before or inside % after:  # this dimension would cut through a sample or a group
            continue
        pre = outside // before
        post = inside // after
        if size == pre * batch_size * post:
            return place_of(tuple(new), dim, pre, post), (*new[:dim], -1, *new[dim + 1 :])
    return None  # a sample's rows would not stay together


@rule("view", "_unsafe_view", "_reshape_alias", on_rows=True)
def _view(func: OpOverload, gradient: HeldRows, shape: Sequence[int], stride: Sequence[int] = ()) -> Any:
    plan = _reshaped(gradient.place, tuple(shape), gradient.rows.batch_size)
    if plan is None:
        return NotImplemented
    place, of_rows = plan  # reshape: the rows need not be contiguous where the full tensor would be
    return wrap(gradient.data_rows.reshape(of_rows), gradient.rows, place)


@lru_cache(maxsize=8192)
def _permuted(place: Place, order: tuple[int, ...]) -> Place:
    return place_of(tuple(place.shape[d] for d in order), order.index(place.dim), place.pre, place.post)


@rule("t", "transpose.int", on_rows=True)
def _transpose(func: OpOverload, gradient: HeldRows, *dims: int) -> Any:
    a, b = dims or (0, gradient.dim() - 1)  # t() takes one or two dimensions
    return wrap(gradient.data_rows.transpose(a, b), gradient.rows, _transposed(gradient.place, a, b))


@lru_cache(maxsize=8192)
def _transposed(place: Place, a: int, b: int) -> Place:
    order = [*range(len(place.shape))]
    order[a], order[b] = order[b], order[a]
    return _permuted(place, tuple(order))


@rule("permute", on_rows=True)
def _permute(func: OpOverload, gradient: HeldRows, dims: Sequence[int]) -> Any:
    order = tuple(d % gradient.dim() for d in dims)
    return wrap(gradient.data_rows.permute(order), gradient.rows, _permuted(gradient.place, order))


@rule("expand", on_rows=True)
def _expand(func: OpOverload, gradient: HeldRows, size: Sequence[int], *, implicit: bool = False) -> Any:
    shape = list(size)
    dim = len(shape) + gradient.place.from_end
    if shape[dim] not in (-1, gradient.place.size):  # a single row is repeated: it would be every sample's
        return NotImplemented
    shape[dim] = -1
    return gradient.like(gradient.data_rows.expand(shape))


@rule("unsqueeze", on_rows=True)
def _unsqueeze(func: OpOverload, gradient: HeldRows, dim: int) -> Any:
    shape = [*gradient.place.shape]
    shape.insert(dim % (gradient.dim() + 1), 1)
    return _view(func, gradient, shape)


@rule("squeeze", "squeeze.dim", "squeeze.dims", on_rows=True)
def _squeeze(func: OpOverload, gradient: HeldRows, dim: int | Sequence[int] | None = None) -> Any:
    given = range(gradient.dim()) if dim is None else dim
    dims = [d % gradient.dim() for d in ([given] if isinstance(given, int) else given)]
    return _view(func, gradient, [n for d, n in enumerate(gradient.place.shape) if n != 1 or d not in dims])


@rule("select.int", on_rows=True)
def _select(func: OpOverload, gradient: HeldRows, dim: int, index: int) -> Any:
    dim %= gradient.dim()
    at = gradient.place.dim
    if dim == at:
        return NotImplemented
    return gradient.moved(gradient.data_rows.select(dim, index), at - (dim < at))


def _groups(gradient: HeldRows, start: int, end: int) -> RowGradient | None:
    """Slice the sample dimension, if that takes whole batches: one of two views that were concatenated."""
    place = gradient.place
    group = gradient.rows.batch_size * place.post
    if start % group or end % group or start >= end:
        return None
    pre = (end - start) // group
    kept = gradient.rows.count * place.post
    data = gradient.data_rows.narrow(place.dim, start // group * kept, pre * kept)
    shape = (*place.shape[: place.dim], end - start, *place.shape[place.dim + 1 :])
    return wrap(data, gradient.rows, place_of(shape, place.dim, pre, place.post))


@rule("slice.Tensor", on_rows=True)
def _slice(
    func: OpOverload, gradient: HeldRows, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    if dim % gradient.dim() != gradient.place.dim:
        return gradient.like(func(gradient.data_rows, dim, start, end, step))
    start, end, step = slice(start, end, step).indices(gradient.place.size)
    groups = _groups(gradient, start, end) if step == 1 else None  # a step would leave samples out
    return NotImplemented if groups is None else groups


@rule("split.Tensor", "split_with_sizes", "unsafe_split.Tensor", "unsafe_split_with_sizes", on_rows=True)
def _split(func: OpOverload, gradient: HeldRows, sizes: int | Sequence[int], dim: int = 0) -> Any:
    if dim % gradient.dim() != gradient.place.dim:
        return [gradient.like(part) for part in func(gradient.data_rows, sizes, dim)]
    ends = [0]
    while ends[-1] < gradient.place.size:
        size = sizes if isinstance(sizes, int) else sizes[len(ends) - 1]
        ends.append(min(ends[-1] + size, gradient.place.size))
    # Along the samples it may split at whole batches alone, which were joined before: views of the batch.
    parts = [_groups(gradient, start, end) for start, end in itertools.pairwise(ends)]
    return NotImplemented if any(part is None for part in parts) else parts


@rule("unbind.int", on_rows=True)
def _unbind(func: OpOverload, gradient: HeldRows, dim: int = 0) -> Any:
    dim %= gradient.dim()
    if dim == gradient.place.dim:
        return NotImplemented
    at = gradient.place.dim - (dim < gradient.place.dim)
    return [gradient.moved(part, at) for part in gradient.data_rows.unbind(dim)]


@rule("cat", "stack")
def _join(func: OpOverload, parts: Sequence[HeldRows], dim: int = 0) -> Any:
    if not all(map(holds_rows, parts)):
        return NotImplemented
    first = parts[0]
    place = first.place
    stacked = func._schema.name == "aten::stack"
    dim %= first.dim() + stacked
    if not all(first.lies_as(part) and part.dim() == first.dim() for part in parts):
        return NotImplemented
    data = func([part.data_rows for part in parts], dim)
    if stacked or dim != place.dim:  # else they become groups of one dimension: two views of the batch, joined
        return first.moved(data, place.dim + (stacked and dim <= place.dim))
    shape = (*place.shape[:dim], place.size * len(parts), *place.shape[dim + 1 :])
    return wrap(data, first.rows, place_of(shape, dim, place.pre * len(parts), place.post))


@rule("constant_pad_nd", on_rows=True)
def _pad(func: OpOverload, gradient: HeldRows, pad: Sequence[int], value: float = 0) -> Any:
    at = 2 * (-1 - gradient.place.from_end)  # pairs run from the last dimension backwards
    if any(pad[at : at + 2]) or value != 0:  # rows are added, or the others would not be zero any more
        return NotImplemented
    return gradient.like(func(gradient.data_rows, pad, 0))


@rule("roll", "flip", "cumsum", on_rows=True)
def _along(func: OpOverload, gradient: HeldRows, *args: Any, **kwargs: Any) -> Any:
    whole = func._schema.name == "aten::roll" and len(args) < 2  # by shifts alone, over the flattened tensor
    dims = args[-1] if isinstance(args[-1], (list, tuple)) else [args[-1]]
    if whole or gradient.place.dim in [d % gradient.dim() for d in dims]:
        return NotImplemented
    return gradient.like(func(gradient.data_rows, *args, **kwargs))


@rule("tril", "triu", on_rows=True)
def _triangle(func: OpOverload, gradient: HeldRows, *diagonal: int) -> Any:
    if gradient.place.from_end >= -2:  # the matrices reach over the samples
        return NotImplemented
    return gradient.like(func(gradient.data_rows, *diagonal))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im", on_rows=True, dim=0)
def _within_a_sample(func: OpOverload, gradient: HeldRows, *args: Any) -> Any:
    if gradient.dim() != (3 if func._schema.name == "aten::col2im" else 4):  # without a batch dimension
        return NotImplemented
    return gradient.moved(func(gradient.data_rows, *args), 0)
