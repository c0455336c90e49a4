"""Step 1 for a batch with NaN or infinity: find the samples that are not finite, and put others in their place.

What stands in such a sample's place is a copy of a sample of the same batch, so that nothing that mixes samples (the
statistics of BatchNorm above all) sees it. That the copy is not trained on is the gate's part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ast.core.batch.containers import Slicer, leaves_of
from lightning_ast.core.batch.rows import all_finite, finite_rows, holds_floats, is_plain, replace_samples
from lightning_ast.core.batch.samples import first_floats, listings_of, samples_of
from lightning_ast.errors import BatchError

__all__ = ["find_finite", "replace_in_batch"]


def find_finite(batch: Any, batch_size: int) -> Tensor | None:
    """Find the samples whose input, the first floating-point tensor, holds finite values alone, ``(B,)`` bool.

    Return None where the host knows that all is finite, or where there is nothing to look at.
    """
    leaf = first_floats(batch, batch_size)
    samples = None if leaf is not None else samples_of(batch, batch_size)
    if samples is not None:
        return _finite_entries(samples)
    if leaf is None or (isinstance(leaf, Tensor) and leaf.is_cpu and is_plain(leaf) and all_finite(leaf)):
        return None
    finite = finite_rows(leaf)
    return None if finite is None or (finite.is_cpu and bool(finite.all())) else finite


def replace_in_batch(batch: Any, finite: Tensor) -> Any:
    """Put the first finite sample in the place of those that are not; without one, NaN and infinity become 0."""
    return _Replacer(batch, finite, listings_of(batch, finite.numel())).take(batch)


def _finite_entries(samples: list[Any]) -> Tensor | None:
    found = []
    for sample in samples:
        leaf = next((leaf for leaf in leaves_of(sample) if holds_floats(leaf)), None)
        if leaf is None:  # a sample without numbers cannot be looked at, and so none can be compared with it
            return None
        leaf = leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)
        rows = finite_rows(leaf[None] if leaf.ndim == 0 else leaf)
        if rows is None:
            return None
        found.append(rows.all())
    finite = torch.stack(found)
    return None if finite.is_cpu and bool(finite.all()) else finite


class _Replacer(Slicer):
    """Puts the first finite sample in the place of those that are not; it leaves alone what it cannot index."""

    def __init__(self, batch: Any, finite: Tensor, listings: frozenset[int]) -> None:
        places = torch.arange(finite.numel(), device=finite.device)
        first = finite.to(torch.uint8).argmax()
        super().__init__(batch, finite.numel(), places.where(finite, first), listings)
        self._finite = finite
        # Positions in lists and arrays are needed on the host. On an accelerator nothing waits for that: lists beside
        # tensors stay as they are. A batch of lists alone has nothing else to replace, and waits.
        self._waits = finite.is_cpu or bool(listings)

    def tensor(self, tensor: Tensor) -> Tensor:
        if is_plain(tensor):
            return replace_samples(tensor, self._finite)
        try:
            return super().tensor(tensor)
        except BatchError:
            return tensor

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
