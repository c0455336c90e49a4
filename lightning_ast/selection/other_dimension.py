"""Whether the samples of a batch lie along another dimension than the first one, as in time-major batches.

Sizes raise the doubt, in the first batch. Where sizes cannot settle it, the forward does: in a time-major batch a time
step changes the rows of later ones, while what stands in one place of the other dimension changes that place alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.batch.containers import leaves_of
from lightning_ast.core.dependence.order import OrderedTrace
from lightning_ast.core.dependence.perturbed import Take
from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.entries.finder import Entry, EntryFinder, Found
from lightning_ast.words import counted

__all__ = ["Doubt", "DoubtfulTrace", "doubt_of"]

_REACHED = 1e-3  # change of the rows of other samples, as a share of a sample's own, above which it counts as one


@dataclass(frozen=True)
class Doubt:
    """A reason to ask whether the samples lie along another dimension."""

    counted: int  # the first dimension, which was taken for the number of samples
    size: int  # of the other dimension, which need not be the same one in each tensor
    loaded: int | None  # the samples that the loader puts into this batch, where it tells
    shapes: tuple[tuple[int, ...], ...]  # of the tensors that have the counted number of rows

    @property
    def is_settled(self) -> bool:
        """Tell whether sizes alone show that the count is wrong."""
        # A collate function may multiply its samples (two views of each). One that drops some loads labels beside them,
        # as a rule: then not every tensor has as many columns as there are samples.
        alike = all(shape[1:2] == (self.size,) for shape in self.shapes)
        return self.loaded not in (None, 1) and self.counted % self.size != 0 and alike

    @property
    def message(self) -> str:
        """Return the text of the error."""
        shapes = ", ".join(map(str, dict.fromkeys(self.shapes)))
        said = "" if self.loaded is None else f"the DataLoader puts {counted(self.loaded, 'sample')} into this batch; "
        return (
            f"expected the samples along the first dimension of the batch's tensors, but in {shapes} they lie along "
            f"the dimension of size {self.size}: {said}the first dimension, of {self.counted}, holds something else, "
            "such as time steps. Put the samples first (batch_first=True in recurrent layers, and a collate_fn that "
            "stacks along dimension 0), or use SparseLossMixin and override `count_samples(batch)` and "
            f"`select_batch(batch, indices)`. If there are {self.counted} samples, let count_samples return that."
        )

    def take(self, tensors: Sequence[Tensor], indices: Tensor) -> list[Tensor]:
        """Take places of the other dimension out of the tensors of a batch, as if these were the samples."""
        taken = []
        for tensor in tensors:
            dim = _dim_of(tuple(tensor.shape), self.size)
            taken.append(tensor if dim is None else tensor.index_select(dim, indices.to(tensor.device)))
        return taken


def doubt_of(batch: Any, rows: int, loaded: int | None) -> Doubt | None:
    """Find a reason in the sizes of a batch to ask whether its first dimension counts samples.

    Example:
        >>> doubt_of((torch.zeros(5, 8, 3), torch.zeros(5, 8)), 5, loaded=8).size
        8
        >>> doubt_of((torch.zeros(8, 5, 3), torch.zeros(8)), 8, loaded=8)
    """
    shapes = tuple(tuple(tensor.shape) for tensor in _tensors(batch) if tensor.shape[:1] == (rows,))
    if not shapes:
        return None
    if loaded is None:
        sizes = {shape[1] if len(shape) > 1 else 1 for shape in shapes}
        return Doubt(rows, min(sizes), None, shapes) if len(sizes) == 1 and min(sizes) > 1 else None
    return Doubt(rows, loaded, loaded, shapes) if any(loaded in shape[1:] for shape in shapes) else None


class DoubtfulTrace(OrderedTrace):  # type: ignore[no-untyped-call]
    """Follows samples as ever, and beside them what would show that the samples lie along another dimension."""

    def __init__(self, batch: Any, doubt: Doubt, *, take: Take | None, only: int | None) -> None:
        super().__init__(batch, doubt.counted, take=take, only=only)
        self.doubt = doubt
        self._other = SampleTrace(list(_tensors(batch)), doubt.size, take=doubt.take)
        self.beside.append(self._other)

    def is_confirmed(self, loss: Tensor, found: Found) -> bool:
        """Tell whether the forward has shown that the samples lie along the other dimension."""
        # It has where places of the first dimension change each other's rows, and those of the other one do not. Where
        # the network treats all places alike, nothing is shown.
        exact = all(entry.exact for entry in found.entries) and not found.unclear
        if self.doubt.size == 1:  # a single sample: nothing can be separate from it
            return exact and any(map(self._is_reached, found.entries))
        if exact and found.entries and not any(map(self._is_reached, found.entries)):
            return False
        if self._other.failure is not None:
            return False
        other = EntryFinder().prove(loss, self.doubt.size, self._other)
        return bool(other.entries) and not other.unclear and all(entry.exact for entry in other.entries)

    def _is_reached(self, entry: Entry) -> bool:
        """Tell whether one of the supposed samples changes rows of the others."""
        changes = self.changes(entry.node, entry.output_nr, entry.place)
        return changes is not None and changes[1] > _REACHED * changes[0]


def _dim_of(shape: tuple[int, ...], size: int) -> int | None:
    """Find the dimension of a size: the first one only where no other has it."""
    dims = [dim for dim, each in enumerate(shape) if each == size]
    return next((dim for dim in dims if dim), dims[0] if dims else None)


def _tensors(batch: Any) -> list[Tensor]:
    """List the ordinary tensors of a batch that have dimensions."""
    found = (leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.dim())
    return [leaf for leaf in found if leaf.layout is torch.strided and not leaf.is_nested]
