"""Step 6, the rows: which rows of a tensor belong to the selected samples, and how they are gathered."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

__all__ = ["BatchNormBackward", "Place", "Rows", "UnequalPlace", "place_of"]

BatchNormBackward = Literal["selected", "exact"]

_Chunk = tuple[int | torch.SymInt, tuple[int, int], torch.dtype, torch.device]
"""The address of gathered memory, its shape as ``(B, stride)``, its type and its device."""
_KEPT = 4
"""Gathered chunks kept for the ops that follow: a layer's input is often its predecessor's saved output."""
_SPARE = 4
"""A chunk may be this many times what is asked of it: q, k and v of one projection are gathered together."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the samples lie in a tensor of full size.

    Attributes:
        shape: The full (logical) shape.
        dim: The dimension that holds the samples; its size is ``pre * B * post``.
        pre: Groups outside the samples: T in ``(T * B, C)``.
        post: Rows of one sample: T in ``(B * T, C)``, the windows of an image in ``(B * windows, ...)``.
        from_end: The dimension ``dim``, counted from the end (negative), as broadcasting does.
        size: Size of ``dim``.
    """

    shape: tuple[int, ...]
    dim: int
    pre: int
    post: int
    from_end: int
    size: int


@dataclass(frozen=True, eq=False)
class UnequalPlace(Place):
    """Where samples with unequal numbers of rows lie, as graphs with their nodes do.

    The assignment, ``(size,)`` int64, tells the sample of each row; the count is the number of samples B.
    """

    assignment: Tensor
    count: int


@lru_cache(maxsize=8192)
def place_of(shape: tuple[int, ...], dim: int, pre: int = 1, post: int = 1) -> Place:
    """Make a place, once for all calls alike: autograd asks for the same few in every step."""
    return Place(tuple(shape), dim, pre, post, dim - len(shape), shape[dim])


@dataclass(frozen=True, eq=False)
class _Plan:
    """How to gather whole samples of memory at once, each with all that lies up to the next."""

    extent: int  # elements that a sample spans
    source: tuple[int, int]  # the memory as (B, stride)
    shape: tuple[int, ...]  # of the gathered tensor, as are the strides
    strides: tuple[int, ...]
    is_direct: bool  # one index_select of the tensor as it is gives them


@lru_cache(maxsize=8192)
def _plan(
    shape: tuple[int, ...], strides: tuple[int, ...], dim: int, pre: int, post: int, batch_size: int, count: int
) -> _Plan | None:
    """Make the plan; return None where two samples overlap in memory or lie too far apart."""
    stride = strides[dim] * post
    elements = math.prod(shape)
    extent = 1 + (post - 1) * strides[dim]
    extent += sum((n - 1) * s for d, (n, s) in enumerate(zip(shape, strides, strict=True)) if d != dim)
    # Samples that are chunks of memory, one after the other, can be gathered as the rows of a two-dimensional view.
    if pre != 1 or elements == 0 or not 0 < extent <= stride <= elements * _SPARE // batch_size:
        return None
    gathered = (*shape[:dim], count * post, *shape[dim + 1 :])
    dense = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    is_direct = dim == 0 and post == 1 and tuple(strides) == dense
    return _Plan(extent, (batch_size, stride), gathered, tuple(strides), is_direct)


class Rows:
    """The k selected samples of a batch of B, for the length of one backward.

    Args:
        indices: ``(k,)`` int64, positions in the batch.
        batch_size: The number of samples B.
        batchnorm: The backward of BatchNorm, as in :func:`lightning_ast.core.select_rows`.
        dense_ops: A counter, by name, of the ops that ran over all rows for want of a rule.
    """

    def __init__(
        self, indices: Tensor, batch_size: int, *, batchnorm: BatchNormBackward, dense_ops: Counter[str]
    ) -> None:
        self.count = indices.numel()
        self.batch_size = batch_size
        self.batchnorm = batchnorm
        self.dense_ops = dense_ops
        self.indices = indices
        # The backward that these rows belong to: one inside it, as of reentrant checkpointing, has another number.
        self.graph_task = torch._C._current_graph_task_id()
        self._on = {indices.device: indices}  # a model may be spread over several devices
        self._folded: dict[tuple[torch.device, int, int], Tensor] = {}
        # Chunks that were gathered, the oldest first, each with its memory and the version of that.
        self._gathered: OrderedDict[_Chunk, tuple[Tensor, torch.UntypedStorage, int | None]] = OrderedDict()
        self._kept = _KEPT

    def on(self, device: torch.device) -> Tensor:
        """Return the indices on a device."""
        if device not in self._on:
            self._on[device] = self.indices.to(device)
        return self._on[device]

    def gather(self, full: Tensor, dim: int, pre: int = 1, post: int = 1) -> Tensor:
        """Gather the samples' rows of ``full``, whose dimension ``dim``, not negative, has ``pre * B * post``."""
        # What is returned may share memory with `full` or with other gathered tensors: rules do not write to it. That
        # a tensor was rewritten through `.data` since it was last gathered in this backward is not noticed.
        plan = _plan(full.shape, full.stride(), dim, pre, post, self.batch_size, self.count)
        if plan is None:
            return self._gather_by_dimension(full, dim, pre, post)
        stride = plan.source[1]
        offset = full.storage_offset()
        start = 0
        if plan.extent < stride:  # a sample is a part of its chunk: where does the chunk begin, and is it all there?
            start = int(offset) % stride
            end = int(offset) - start + self.batch_size * stride
            inside = end * full.element_size() <= full.untyped_storage().nbytes()
            if start + plan.extent > stride or not inside:
                return self._gather_by_dimension(full, dim, pre, post)
        chunk = self._chunk(full, plan, offset, start)
        if plan.is_direct and chunk.shape == plan.shape:
            return chunk
        return chunk.as_strided(plan.shape, plan.strides, start)

    def _chunk(self, full: Tensor, plan: _Plan, offset: int | torch.SymInt, start: int) -> Tensor:
        """Take the selected chunks of the memory behind ``full``, by one index_select or from the cache.

        The memory of ``full`` begins at an offset of its storage, ``start`` elements into the first chunk.
        """
        version = None if full.is_inference() else full._version
        device = full.device
        address = full.data_ptr() - (full.element_size() * start if start else 0)
        key = (address, plan.source, full.dtype, device)
        hit = self._gathered.get(key)
        # The version tells whether the memory was written to since; meta tensors all have the same address.
        if hit is not None and hit[2] == version and version is not None and device.type != "meta":
            return hit[0]
        source = full if plan.is_direct else full.as_strided(plan.source, (plan.source[1], 1), offset - start)
        chunk = source.index_select(0, self.on(device))
        memory = full.untyped_storage()  # held, or it might be another tensor's next; not `full`, which holds its graph
        self._gathered[key] = (chunk, memory, version)
        if len(self._gathered) > self._kept:
            self._gathered.popitem(last=False)
        return chunk

    def _gather_by_dimension(self, full: Tensor, dim: int, pre: int, post: int) -> Tensor:
        if pre == post == 1 and full.stride(dim) == 0:  # expanded along the batch: all rows are equal
            return full.narrow(dim, 0, self.count)
        return full.index_select(dim, self._positions(full.device, pre, post))

    def _positions(self, device: torch.device, pre: int, post: int) -> Tensor:
        """Return where the selected rows are in a dimension of size ``pre * B * post``."""
        if pre == post == 1:
            return self.on(device)
        key = device, pre, post
        if key not in self._folded:
            groups = torch.arange(pre, device=device).view(-1, 1, 1) * self.batch_size
            within = torch.arange(post, device=device)
            self._folded[key] = ((groups + self.on(device).view(-1, 1)) * post + within).flatten()
        return self._folded[key]

    def scatter(self, data: Tensor, place: Place, memory_format: torch.memory_format) -> Tensor:
        """Undo :meth:`gather`: make the full tensor of the selected rows, zero where nothing was selected."""
        # torch.zeros takes no memory format. Added and not copied, because a position may be selected twice.
        full = torch.empty(place.shape, dtype=data.dtype, device=data.device, memory_format=memory_format).zero_()
        return full.index_add_(place.dim, self._positions(data.device, place.pre, place.post), data)

    def forget(self) -> None:
        """Let go of what was gathered, and keep no more of it: the backward is over, a gradient may live on."""
        self._kept = 0
        self._gathered.clear()
