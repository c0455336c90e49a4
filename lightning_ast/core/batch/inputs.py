"""Step 1 for the input of a batch: find it, find the samples that are not finite, and put others in their place.

What stands in such a sample's place is a copy of a sample of the same batch, so that nothing that mixes samples (the
statistics of BatchNorm above all) sees it. That the copy is not trained on is the gate's part.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ast.core.batch.containers import Slicer, children_of, holds_floats, is_plain, leaves_of, row_count
from lightning_ast.core.batch.samples import listings_of, samples_of
from lightning_ast.errors import BatchError

__all__ = ["all_finite", "find_finite", "first_input", "replace_in_batch"]


def first_input(batch: Any, batch_size: int) -> Tensor | None:
    """Find the first floating-point tensor with leading dimension ``batch_size``, e.g. the images; None without one."""
    leaf = _first_floats(batch, batch_size)
    return leaf if isinstance(leaf, Tensor) and is_plain(leaf) else None


def find_finite(batch: Any, batch_size: int) -> Tensor | None:
    """Find the samples whose input, the first floating-point tensor, holds finite values alone, ``(B,)`` bool.

    Return None where the host knows that all is finite, or where there is nothing to look at.
    """
    leaf = _first_floats(batch, batch_size)
    if isinstance(leaf, Tensor) and leaf.is_cpu and is_plain(leaf) and all_finite(leaf):
        return None
    finite = _finite_entries(samples_of(batch, batch_size) or []) if leaf is None else _finite_rows(leaf)
    return None if finite is None or (finite.is_cpu and bool(finite.all())) else finite


def all_finite(values: Tensor) -> bool:
    """Tell whether every value is finite, in one pass where it is so; wait for the device."""
    total = values if values.ndim == 0 else values.sum()
    return math.isfinite(total.item()) or bool(values.isfinite().all())  # the sum of finite values may overflow


def replace_in_batch(batch: Any, finite: Tensor) -> Any:
    """Put the first finite sample in the place of those that are not; without one, NaN and infinity become 0."""
    return _Replacer(batch, finite, listings_of(batch, finite.numel())).take(batch)


def _first_floats(batch: Any, size: int) -> Tensor | np.ndarray[Any, Any] | None:
    """Find the first floating-point tensor or array whose rows are the samples; None where there is none."""
    try:
        for part in [batch] if isinstance(batch, (Tensor, np.ndarray)) else children_of(batch) or ():
            if not isinstance(part, (Tensor, np.ndarray)):
                break
            if row_count(part) == size and holds_floats(part):  # rows beside which nothing lists the samples
                return part
        if samples_of(batch, size) is not None:
            return None
        return next((leaf for leaf in leaves_of(batch) if row_count(leaf) == size and holds_floats(leaf)), None)
    except BatchError:
        return None


def _finite_entries(samples: list[Any]) -> Tensor | None:
    found = []
    for sample in samples:
        leaf = next((leaf for leaf in leaves_of(sample) if holds_floats(leaf)), None)
        rows = None if leaf is None else _finite_rows(leaf[None] if leaf.ndim == 0 else leaf)
        if rows is None:  # a sample without numbers cannot be looked at, and so none can be compared with it
            return None
        found.append(rows.all())
    return torch.stack(found) if found else None


def _finite_rows(leaf: Tensor | np.ndarray[Any, Any]) -> Tensor | None:
    """Find the rows of floating-point numbers ``(B, ...)`` that hold finite values alone, ``(B,)`` bool.

    No device is waited for. Return None where torch cannot look into the layout.
    """
    values = leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)
    if is_plain(values):
        return _finite_samples(values)
    try:
        if values.is_nested:
            return torch.stack([row.isfinite().all() for row in values.unbind()])
        sparse = values.to_sparse(layout=torch.sparse_coo).coalesce()  # what is not stored is zero, and so finite
        bad = sparse.indices()[0][~_finite_samples(sparse.values())]
        return torch.ones(values.shape[0], dtype=torch.bool, device=values.device).index_fill(0, bad, value=False)
    except (NotImplementedError, RuntimeError):
        return None


def _finite_samples(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()


class _Replacer(Slicer):
    """Puts the first finite sample in the place of those that are not; it leaves alone what it cannot index."""

    def __init__(self, batch: Any, finite: Tensor, listings: frozenset[int]) -> None:
        places = torch.arange(finite.numel(), device=finite.device)
        self._first = finite.to(torch.uint8).argmax().reshape(1)  # as a tensor: no device is waited for to read it
        super().__init__(batch, finite.numel(), places.where(finite, self._first), listings)
        self._finite = finite
        # Positions in lists and arrays are needed on the host. On an accelerator nothing waits for that: lists beside
        # tensors stay as they are. A batch of lists alone has nothing else to replace, and waits.
        self._waits = finite.is_cpu or bool(listings)

    def tensor(self, tensor: Tensor) -> Tensor:
        if not is_plain(tensor):
            try:
                return super().tensor(tensor)
            except BatchError:
                return tensor
        first = tensor.index_select(0, self._first.to(tensor.device))
        if first.is_floating_point():  # where no sample is finite, the first of them becomes zeros
            first = _zeroed(first)
        finite = self._finite.to(tensor.device)
        return torch.where(finite.reshape(-1, *[1] * (tensor.ndim - 1)), tensor, first)

    def array(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        taken: np.ndarray[Any, Any] = self._cleaned(super().array(array)) if self._waits else array
        return taken

    def entries(self, part: Any) -> list[Any]:
        return [self._cleaned(entry) for entry in super().entries(part)] if self._waits else list(part)

    def unknown(self, part: Any) -> Any:
        return part  # it may hold NaN still, but the gate leaves the sample out in any case

    def _tensordict(self, part: Any) -> Any:
        some = self._finite.any()
        return super()._tensordict(part).apply(lambda t: t if not t.is_floating_point() else t.where(some, _zeroed(t)))

    def _cleaned(self, entry: Any) -> Any:
        return entry if bool(self._finite.any()) else _Cleaner().take(entry)


class _Cleaner(Slicer):
    """Makes the same containers with 0 for NaN and infinity, for a batch without any finite sample."""

    def __init__(self) -> None:
        super().__init__(None, -1, torch.zeros(0, dtype=torch.long), frozenset())

    def take(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            return _zeroed(part) if part.is_floating_point() and is_plain(part) else part
        if isinstance(part, np.ndarray):
            return np.nan_to_num(part, posinf=0.0, neginf=0.0) if holds_floats(part) else part
        return super().take(part)

    def unknown(self, part: Any) -> Any:
        return part


def _zeroed(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0)
