"""Step 1 for one tensor of a batch: count its rows, and take some."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

__all__ = ["holds_floats", "is_plain", "row_count", "take_rows", "to_host"]


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


def to_host(columns: list[Tensor]) -> list[Tensor]:
    """Copy floating-point or Boolean tensors ``(B,)`` to the host, all of them at once, because each copy waits.

    Example:
        >>> to_host([torch.tensor([0.5, 1.0]), torch.tensor([True, False])])
        [tensor([0.5000, 1.0000]), tensor([ True, False])]
    """
    wide = reduce(torch.promote_types, (column.dtype for column in columns))
    copied = torch.stack([column.to(columns[0].device, wide) for column in columns]).cpu()
    return [row.to(column.dtype) for row, column in zip(copied, columns, strict=True)]
