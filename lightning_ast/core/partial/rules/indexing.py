"""Ops that write a gradient into a larger tensor of zeros: slices, selections, gathers, embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows, holds_rows, wrap
from lightning_ast.core.partial.memory import GradientMemory
from lightning_ast.core.partial.registry import rule
from lightning_ast.core.partial.rows import place_of

__all__ = []


@rule("select_backward", on_rows=True)
def _select_backward(func: OpOverload, gradient: HeldRows, sizes: list[int], dim: int, index: int) -> Any:
    sizes = list(sizes)
    dim %= len(sizes)
    at = gradient.place.dim + (dim <= gradient.place.dim)  # for the selected dimension is there again
    if dim == at or sizes[at] != gradient.place.size:
        return NotImplemented
    sizes[at] = gradient.data_rows.shape[gradient.place.dim]
    return gradient.moved(func(gradient.data_rows, sizes, dim, index), at)


@rule("slice_backward", on_rows=True)
def _slice_backward(
    func: OpOverload, gradient: HeldRows, sizes: list[int], dim: int, start: int, end: int, step: int
) -> Any:
    place = gradient.place
    sizes = list(sizes)
    dim %= len(sizes)
    if dim != place.dim:  # inside each sample
        sizes[place.dim] = gradient.data_rows.shape[place.dim]
        return gradient.like(func(gradient.data_rows, sizes, dim, start, end, step))
    group = gradient.rows.batch_size * place.post
    first, _, _ = slice(start, end, step).indices(sizes[dim])
    if step != 1 or sizes[dim] % group or first % group:
        return NotImplemented
    kept = gradient.rows.count * place.post  # one of several views, concatenated along the batch
    full = tuple(sizes)
    sizes[dim] = sizes[dim] // group * kept
    first = first // group * kept
    data = func(gradient.data_rows, sizes, dim, first, first + gradient.data_rows.shape[dim], 1)
    return wrap(data, gradient.rows, place_of(full, dim, full[dim] // group, place.post))


_SELECTING = ("Max", "Min", "Sort", "Topk", "Kthvalue", "Median", "Nanmedian", "Mode")
"""Nodes whose formula scatters into zeros that, in some versions of torch, do not come from the gradient."""


def _is_zeros(tensor: Any) -> bool:
    if type(tensor) is GradientMemory:
        return tensor.untouched
    node = torch._C._current_autograd_node()
    return type(tensor) is Tensor and node is not None and node.name().partition("Backward")[0] in _SELECTING


@rule("scatter.src", "scatter_add")
def _scatter(func: OpOverload, zeros: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """Run the backward of gather, max, min, sort and the like, where they run inside a sample."""
    # What is written into must be zero in all other rows, or the rows alone would not be the whole result.
    if not _is_zeros(zeros) or not holds_rows(source):
        return NotImplemented
    place = source.place
    if dim % zeros.dim() == place.dim or zeros.shape[place.dim] != place.size or index.shape != source.shape:
        return NotImplemented
    shape = list(zeros.shape)
    shape[place.dim] = source.data_rows.shape[place.dim]
    rows = func(source.data_rows.new_zeros(shape), dim, source.rows_of(index, place.dim), source.data_rows)
    return source.like(rows)


@rule("index_put")
def _index_put(
    func: OpOverload, zeros: Tensor, indices: list[Tensor | None], source: Tensor, accumulate: bool = False
) -> Any:
    """Run the backward of ``x[:, index]`` and of ``x[arange(B), index]``."""
    if type(zeros) is not GradientMemory or not holds_rows(source):
        return NotImplemented
    place = source.place
    used = [i for i, index in enumerate(indices) if index is not None]
    # Indices with a gap between them move their dimension to the front; a mask yields a number of rows of its own.
    adjacent = used == list(range(used[0], used[-1] + 1))
    whole = all(index is None or index.dtype in (torch.int64, torch.int32) for index in indices)
    if place.dim != 0 or zeros.shape[0] != place.size or not adjacent or not whole:
        return NotImplemented
    target = source.data_rows.new_zeros((source.data_rows.shape[0], *zeros.shape[1:]))
    if indices[0] is not None:
        picked = _one_per_sample(indices, source)
        if picked is None:
            return NotImplemented
        indices = picked
    return source.moved(func(target, indices, source.data_rows, accumulate), 0)


def _one_per_sample(indices: list[Tensor | None], source: HeldRows) -> list[Tensor | None] | None:
    """Make ``[arange(k), index[rows], ...]`` of ``[arange(B), index, ...]``; wait for the device to read the first."""
    rows = source.rows
    given = [index for index in indices if index is not None and index.shape == (rows.batch_size,)]
    if source.place.post != 1 or source.place.pre != 1 or len(given) < len(indices):
        return None
    device = source.data_rows.device
    selected = [rows.gather(index, 0) for index in given]
    if not torch.equal(selected[0].to(device), rows.on(device)):
        return None
    return [torch.arange(rows.count, device=device), *selected[1:]]


@rule("embedding_dense_backward", on_rows=True)
def _embedding(func: OpOverload, gradient: HeldRows, index: Tensor, *rest: Any) -> Any:
    by_frequency = rest[2]  # of the indices in the whole batch
    if gradient.place.dim >= index.dim() or by_frequency:
        return NotImplemented
    return func(gradient.packed(), gradient.rows_of(index, gradient.place.dim), *rest)


@rule("diagonal_backward", "unfold_backward", on_rows=True)
def _strided_backward(func: OpOverload, gradient: HeldRows, sizes: list[int], *args: Any) -> Any:
    """Run the backward of Tensor.diagonal and Tensor.unfold, where the samples lie before the dimensions they use."""
    sizes = list(sizes)
    place = gradient.place
    diagonal = func._schema.name == "aten::diagonal_backward"
    dims = [d % len(sizes) for d in (args[1:3] if diagonal else args[:1])]
    # A sample would get more rows, or lie along the diagonal.
    if place.dim >= min(dims) or sizes[place.dim] != place.size:
        return NotImplemented
    sizes[place.dim] = gradient.data_rows.shape[place.dim]
    return gradient.moved(func(gradient.data_rows, sizes, *args), place.dim)
