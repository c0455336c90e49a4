"""Step 2, second values for tensors: one shadow storage beside each storage.

So all views of a storage have their shadow too, and what is written through one of them is seen through all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Kind", "Shadows"]

_LARGE_BYTES = 2**30  # storages above this size are not copied where the batch is a small part of them


class Kind(Enum):
    """What is known about the values of a tensor."""

    UNSEEN = auto()  # made outside the trace's sight: parameters, or what a compiled kernel returns
    PLAIN = auto()  # independent of the sample
    EMPTY = auto()  # allocated, not yet written by an operation that was seen
    UNKNOWN = auto()
    SHADOW = auto()


@dataclass
class _Entry:
    alive: Any  # a StorageWeakRef, which is untyped: it also keeps the storage's address from being used again
    kind: Kind
    shadow: torch.UntypedStorage | None = None
    picked_rows: int | None = None  # rows that values chose one by one, as a mask does


class Shadows:
    """Keeps for each storage what is known about it, and its shadow; entries end with their storage."""

    def __init__(self) -> None:
        # By the address of the storage: views are objects of their own, and a tensor's id may be used again.
        self._entries: dict[int, _Entry] = {}
        self._objects = WeakTensorKeyDictionary()  # tensors without a storage of their own: sparse, mkldnn

    def __len__(self) -> int:
        return sum(entry.shadow is not None for entry in self._entries.values()) + len(self._objects)

    def kind(self, tensor: Tensor) -> Kind:
        """Tell what is known about a tensor's values."""
        if tensor.device.type == "meta":
            return Kind.UNKNOWN
        storage = _storage(tensor)
        if storage is None:
            if tensor not in self._objects:
                return Kind.UNSEEN
            return Kind.UNKNOWN if self._objects[tensor] is None else Kind.SHADOW
        entry = self._entries.get(storage._cdata)
        if entry is None:
            return Kind.UNSEEN
        return Kind.PLAIN if entry.kind is Kind.EMPTY and tensor.numel() == 0 else entry.kind

    def key(self, tensor: Tensor) -> int | None:
        """Return what is the same for all tensors that share their memory; None without memory of its own."""
        storage = _storage(tensor)
        return None if storage is None else storage._cdata

    def of(self, tensor: Tensor) -> Tensor:
        """Return the shadow of a tensor whose kind is ``SHADOW``: the same view of the shadow storage."""
        storage = _storage(tensor)
        if storage is None:
            shadow: Tensor = self._objects[tensor]
            return shadow
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        made = self._entries[storage._cdata].shadow
        assert made is not None
        view.set_(made, tensor.storage_offset(), tensor.size(), tensor.stride())
        if tensor.is_conj():
            view = view.conj()
        return torch._neg_view(view) if tensor.is_neg() else view

    def add(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add the tensors of a batch with their changed copies; several of them may share one storage."""
        for real, shadow in pairs:
            storage = _storage(real)
            if storage is None:
                self._objects[real] = shadow
                continue
            if storage.nbytes() > max(_LARGE_BYTES, 2 * real.nbytes):
                raise MemoryError(
                    "the batch is a small part of a large tensor, which would be copied: use a copy of it"
                )
            self.start(real)
            _write(self.of(real), shadow)

    def start(self, tensor: Tensor) -> None:
        """Give a tensor's storage a shadow that is still equal to it, if it has none."""
        storage = _storage(tensor)
        if storage is not None and self.kind(tensor) is not Kind.SHADOW:
            self._set(storage, Kind.SHADOW, storage.clone())  # type: ignore[no-untyped-call]

    def adopt(self, real: Tensor, shadow: Tensor) -> None:
        """Take what an operation returned for shadows as the shadow of what it returned for the real tensors."""
        storage = _storage(real)
        made = _storage(shadow)
        if storage is None or made is None:
            self._objects[real] = shadow
            return
        if storage._cdata == made._cdata:
            return  # both are views of one real tensor, which has no shadow
        self.start(real)
        view = self.of(real)
        if made._cdata != view.untyped_storage()._cdata or view.stride() != shadow.stride():
            _write(view, shadow)

    def mark(self, tensor: Tensor, kind: Kind) -> None:
        """Set what is known about a tensor's storage, and drop its shadow."""
        storage = _storage(tensor)
        if storage is not None:
            self._set(storage, kind, None)
        elif kind is Kind.UNKNOWN:
            self._objects[tensor] = None
        elif tensor in self._objects:
            del self._objects[tensor]

    def is_picked(self, tensor: Tensor) -> bool:
        """Tell whether the values of other tensors chose the rows of a tensor one by one."""
        entry = self._entries.get(self.key(tensor) or 0)
        return entry is not None and tensor.dim() > 0 and entry.picked_rows == tensor.shape[0]

    def set_picked(self, tensor: Tensor) -> None:
        """Remember that the rows of a tensor were chosen one by one."""
        entry = self._entries.get(self.key(tensor) or 0)
        if entry is not None and tensor.dim() > 0:
            entry.picked_rows = tensor.shape[0]

    def sweep(self) -> None:
        """Drop the shadows of storages that are no longer in use."""
        for key in [key for key, entry in self._entries.items() if entry.alive.expired()]:
            del self._entries[key]

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._objects.clear()

    def _set(self, storage: torch.UntypedStorage, kind: Kind, shadow: torch.UntypedStorage | None) -> None:
        before = self._entries.get(storage._cdata)
        alive = StorageWeakRef(storage) if before is None else before.alive  # type: ignore[no-untyped-call]
        self._entries[storage._cdata] = _Entry(alive, kind, shadow)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return None
    return tensor.untyped_storage()


def _write(view: Tensor, values: Tensor) -> None:
    """Copy values into a view; where it repeats its memory (``expand``), the first of the repeated ones."""
    for dim, stride in enumerate(view.stride()):
        if stride == 0 and view.shape[dim] > 1:
            view = view.narrow(dim, 0, 1)
            values = values.narrow(dim, 0, 1)
    view.copy_(values)
