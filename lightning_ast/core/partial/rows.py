"""Which rows of a tensor belong to the selected samples, and how they are gathered."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["BatchNormBackward", "Place", "Rows", "place_of"]

BatchNormBackward = Literal["selected", "exact"]

_KEPT = 4
"""Gathered chunks kept for the ops that follow: a layer's input is often its predecessor's saved output."""
_SPARE = 4
"""A chunk may be this many times what is asked of it: q, k and v of one projection are gathered together."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the samples lie in a tensor of full size.

    Attributes:
        shape: the full (logical) shape.
        dim: the dimension that holds the samples; its size is ``pre * B * post``.
        pre: groups outside the samples: T in ``(T * B, C)``.
        post: rows of one sample: T in ``(B * T, C)``, the windows of an image in ``(B * windows, ...)``.
        from_end: ``dim``, counted from the end (negative), as broadcasting does.
        size: size of ``dim``.
    """

    shape: tuple[int, ...]
    dim: int
    pre: int
    post: int
    from_end: int
    size: int


@lru_cache(maxsize=8192)
def place_of(shape: tuple[int, ...], dim: int, pre: int = 1, post: int = 1) -> Place:
    """The place, made once: autograd asks for the same few in every step."""
    return Place(tuple(shape), dim, pre, post, dim - len(shape), shape[dim])


class Rows:
    """The k selected samples of a batch of B, for the length of one backward.

    Args:
        indices: ``(k,)`` int64, positions in the batch.
        batch_size: B.
        batchnorm: how the backward of BatchNorm in training mode is taken, see
            :func:`lightning_ast.core.partial.select_rows`.
        dense_ops: counts, by name, the ops that ran over all rows for want of a rule.
    """

    def __init__(
        self, indices: Tensor, batch_size: int, *, batchnorm: BatchNormBackward, dense_ops: Counter[str]
    ) -> None:
        self.count = indices.numel()
        self.batch_size = batch_size
        self.batchnorm = batchnorm
        self.dense_ops = dense_ops
        self.indices = indices
        self.graph_task = torch._C._current_graph_task_id()
        self._on = {indices.device: indices}
        self._gathered: OrderedDict[Any, tuple[Tensor, Tensor, int | None]] = OrderedDict()

    def on(self, device: torch.device) -> Tensor:
        """The indices on a device."""
        if device not in self._on:
            self._on[device] = self.indices.to(device)
        return self._on[device]

    def gather(self, full: Tensor, dim: int, pre: int = 1, post: int = 1) -> Tensor:
        """The selected samples' rows of ``full``, whose dimension ``dim`` has size ``pre * B * post``.

        Returns:
            ``full``'s shape with ``pre * k * post`` rows in ``dim``. It may share memory with ``full`` or with other
            gathered tensors: not to be written to.
        """
        plan = _chunk(full.shape, full.stride(), dim, pre, post, self.batch_size)
        if plan is not None:
            chunk = self._gather_chunk(full, *plan)
            if chunk is not None:
                gathered, start = chunk
                shape = list(full.shape)
                shape[dim] = self.count * post
                return gathered.as_strided(shape, full.stride(), start)
        if pre == post == 1:
            if full.stride(dim) == 0:  # expanded along the batch: all rows are equal
                return full.narrow(dim, 0, self.count)
            return self._pick(full, dim)
        split = full.reshape(*full.shape[:dim], pre, self.batch_size, post, *full.shape[dim + 1 :])
        return self._pick(split, dim + 1).flatten(dim, dim + 2)

    def _gather_chunk(self, full: Tensor, stride: int, extent: int) -> tuple[Tensor, int] | None:
        """Gather whole samples of the memory behind ``full`` by one two-dimensional index_select."""
        offset, storage = int(full.storage_offset()), full.untyped_storage()
        start = 0 if extent == stride else offset % stride
        begin = offset - start
        if start + extent > stride or (begin + self.batch_size * stride) * full.element_size() > storage.nbytes():
            return None
        version = None if full.is_inference() else full._version
        key = (storage._cdata, begin, stride, full.dtype)
        hit = self._gathered.get(key)
        if hit is not None and version is not None and hit[2] == version:
            return hit[0], start
        samples = full.as_strided((self.batch_size, stride), (stride, 1), begin)
        chunk = samples.index_select(0, self.on(full.device))
        self._gathered[key] = (chunk, full, version)  # holds `full`, or its memory might be another tensor's next
        if len(self._gathered) > _KEPT:
            self._gathered.popitem(last=False)
        return chunk, start

    def _pick(self, full: Tensor, dim: int) -> Tensor:
        """index_select that keeps the order of the dimensions in memory."""
        order = sorted(range(full.dim()), key=full.stride, reverse=True)
        picked = full.permute(order).index_select(order.index(dim), self.on(full.device))
        return picked.permute([order.index(d) for d in range(full.dim())])

    def scatter(self, data: Tensor, place: Place) -> Tensor:
        """The inverse of :meth:`gather`: the full tensor, zero where nothing was selected.

        Args:
            data: the selected rows.
            place: of the full tensor.
        """
        full_shape = place.shape
        if place.pre == place.post == 1:
            last = data.dim() == 4 and data.is_contiguous(memory_format=torch.channels_last)
            full = torch.empty(
                full_shape,
                dtype=data.dtype,
                device=data.device,
                memory_format=torch.channels_last if last else torch.contiguous_format,
            ).zero_()
            return full.index_add_(place.dim, self.on(data.device), data)
        dim, groups = place.dim, (place.pre, self.count, place.post)
        full = data.new_zeros((*full_shape[:dim], place.pre, self.batch_size, place.post, *full_shape[dim + 1 :]))
        full.index_add_(dim + 1, self.on(data.device), data.reshape(*full_shape[:dim], *groups, *full_shape[dim + 1 :]))
        return full.view(full_shape)


@lru_cache(maxsize=8192)
def _chunk(
    shape: tuple[int, ...], strides: tuple[int, ...], dim: int, pre: int, post: int, batch_size: int
) -> tuple[int, int] | None:
    """Elements from one sample to the next, and elements that a sample spans, if no two samples overlap in memory."""
    stride = strides[dim] * post
    elements = math.prod(shape)
    extent = 1 + (post - 1) * strides[dim]
    extent += sum((n - 1) * s for d, (n, s) in enumerate(zip(shape, strides, strict=True)) if d != dim)
    fits = pre == 1 and elements > 0 and stride > 0 and extent <= stride <= elements * _SPARE // batch_size
    return (stride, extent) if fits else None
