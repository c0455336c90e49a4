"""Step 1 for one tensor of a batch: count its rows, take some, and find and replace those that are not finite."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "all_finite",
    "finite_rows",
    "finite_samples",
    "holds_floats",
    "is_plain",
    "replace_samples",
    "row_count",
    "take_rows",
    "to_host",
]


def row_count(leaf: Any) -> int | None:
    """Return the leading dimension of a tensor or an array; None where it has none."""
    if leaf.ndim == 0:
        return None
    return int(leaf.size(0) if isinstance(leaf, Tensor) else leaf.shape[0])  # strided nested ones have no shape


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is an ordinary one: neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def holds_floats(leaf: Any) -> bool:
    """Tell whether a tensor or an array holds floating-point numbers."""
    return leaf.is_floating_point() if isinstance(leaf, Tensor) else leaf.dtype.kind == "f"


def take_rows(tensor: Tensor, indices: Tensor, shared: dict[int, Tensor]) -> Tensor:
    """Take the rows at ``(k,)`` positions, on its device, out of a tensor ``(B, ...)``, and keep its layout.

    ``shared`` has the offsets of the rows taken, by the id of the jagged offsets that they come from.
    """
    if tensor.is_nested:
        taken: Tensor = _take_nested(tensor, indices.tolist(), shared)
        return taken
    if tensor.layout in (torch.strided, torch.sparse_coo):
        return tensor.index_select(0, indices)
    # torch cannot index rows of the compressed layouts, but of COO, which each of them turns into.
    return tensor.to_sparse(layout=torch.sparse_coo).index_select(0, indices).to_sparse(layout=tensor.layout)


def _take_nested(tensor: Any, indices: list[int], shared: dict[int, Tensor]) -> Any:
    rows = tensor.unbind()  # views: torch has no index_select for nested tensors
    taken: Any = torch.nested.as_nested_tensor([rows[i] for i in indices], layout=tensor.layout)
    if tensor.layout is not torch.jagged:
        return taken
    # Tensors that shared their offsets must share the new ones: torch compares offsets by identity.
    known = shared.setdefault(id(tensor.offsets()), taken.offsets())
    if known is taken.offsets() or taken.values().shape[0] != int(known[-1]):
        return taken
    return torch.nested.nested_tensor_from_jagged(taken.values(), offsets=known)


def finite_rows(leaf: Any) -> Tensor | None:
    """Find the rows of a floating-point tensor or array ``(B, ...)`` that hold finite values alone, ``(B,)`` bool.

    Return None where torch cannot look into the layout.
    """
    if not isinstance(leaf, Tensor):
        return finite_samples(torch.tensor(leaf))
    if is_plain(leaf):
        return finite_samples(leaf)
    try:
        if leaf.is_nested:
            return torch.stack([row.isfinite().all() for row in leaf.unbind()])
        sparse = leaf.to_sparse(layout=torch.sparse_coo).coalesce()  # what is not stored is zero, and so finite
        bad = sparse.indices()[0][~finite_samples(sparse.values())]
        return torch.ones(leaf.shape[0], dtype=torch.bool, device=leaf.device).index_fill(0, bad, value=False)
    except (NotImplementedError, RuntimeError):
        return None


def all_finite(values: Tensor) -> bool:
    """Tell whether every value is finite, in one pass where it is so; wait for the device."""
    total = values if values.ndim == 0 else values.sum()
    return math.isfinite(total.item()) or bool(values.isfinite().all())  # the sum of finite values may overflow


def finite_samples(values: Tensor) -> Tensor:
    """Tell which samples of ``(B, ...)`` hold finite values alone, ``(B,)`` bool; no device is waited for."""
    return values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()


def replace_samples(values: Tensor, finite: Tensor) -> Tensor:
    """Put the first finite sample in the place of those that are not, in ``(B, ...)``; no device is waited for.

    ``finite`` is ``(B,)`` bool, on any device. Values of another length come back as they are.
    """
    if values.ndim == 0 or values.shape[0] != finite.numel():
        return values
    finite = finite.to(values.device)
    first = values.index_select(0, finite.to(torch.uint8).argmax().reshape(1))  # as a tensor: its place is not read
    if first.is_floating_point():  # where no sample is finite, the first of them becomes zeros
        first = first.nan_to_num(0.0, 0.0, 0.0)
    return torch.where(finite.reshape(-1, *[1] * (values.ndim - 1)), values, first)


def to_host(columns: list[Tensor]) -> list[Tensor]:
    """Copy floating-point or Boolean tensors ``(B,)`` to the host, all of them at once, because each copy waits.

    Example:
        >>> to_host([torch.tensor([0.5, 1.0]), torch.tensor([True, False])])
        [tensor([0.5000, 1.0000]), tensor([ True, False])]
    """
    wide = reduce(torch.promote_types, (column.dtype for column in columns))
    copied = torch.stack([column.to(columns[0].device, wide) for column in columns]).cpu()
    return [row.to(column.dtype) for row, column in zip(copied, columns, strict=True)]
