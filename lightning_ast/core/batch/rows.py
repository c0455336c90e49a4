"""Step 1 for one tensor of a batch: count its rows, take some, and find and replace those that are not finite."""

from __future__ import annotations

import math
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
]


def row_count(leaf: Any) -> int | None:
    """Return the leading dimension of a tensor or an array; None where it has none.

    Example:
        >>> row_count(torch.zeros(4, 3)), row_count(torch.tensor(1.0))
        (4, None)
    """
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

    ``shared`` has the offsets of the rows taken, by the id of the jagged offsets that they come from. Jagged tensors
    that share their offsets can be combined, and have to share them afterwards; pass one dict for a whole batch.

    Raises:
        RuntimeError: Torch cannot do it for this layout (block-sparse tensors).

    Example:
        >>> take_rows(torch.eye(3).to_sparse(), torch.tensor([2, 0]), {}).to_dense()
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
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
    known = shared.setdefault(id(tensor.offsets()), taken.offsets())
    if known is taken.offsets() or taken.values().shape[0] != int(known[-1]):
        return taken
    return torch.nested.nested_tensor_from_jagged(taken.values(), offsets=known)


def finite_rows(leaf: Any) -> Tensor | None:
    """Find the rows of a floating-point tensor or array ``(B, ...)`` that hold finite values alone, ``(B,)`` bool.

    Return None where torch cannot look into the layout.

    Example:
        >>> finite_rows(torch.tensor([[1.0, 0.0], [0.0, float("nan")]]).to_sparse())
        tensor([ True, False])
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
    """Tell whether every value is finite, in one pass where it is so; wait for the device.

    Example:
        >>> all_finite(torch.ones(3)), all_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    total = values if values.ndim == 0 else values.sum()
    return math.isfinite(total.item()) or bool(values.isfinite().all())  # the sum of finite values may overflow


def finite_samples(values: Tensor) -> Tensor:
    """Tell which samples of ``(B, ...)`` hold finite values alone, ``(B,)`` bool; no device is waited for.

    Example:
        >>> finite_samples(torch.tensor([[1.0, 2.0], [float("inf"), 0.0]]))
        tensor([ True, False])
    """
    return values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()


def replace_samples(values: Tensor, finite: Tensor) -> Tensor:
    """Put the first finite sample in the place of those that are not; no device is waited for.

    Values are ``(B, ...)`` of any type, and keep shape, type and memory format; those of another shape come back as
    they are. ``finite`` is ``(B,)`` bool, on any device. Without a finite sample, NaN and infinity become 0.

    Example:
        >>> replace_samples(torch.tensor([7, 8, 9]), torch.tensor([False, True, False]))
        tensor([8, 8, 8])
    """
    if values.ndim == 0 or values.shape[0] != finite.numel():
        return values
    finite = finite.to(values.device)
    first = values.index_select(0, finite.to(torch.uint8).argmax().reshape(1))  # as a tensor: its place is not read
    if first.is_floating_point():
        first = first.nan_to_num(0.0, 0.0, 0.0)
    return torch.where(finite.reshape(-1, *[1] * (values.ndim - 1)), values, first)
