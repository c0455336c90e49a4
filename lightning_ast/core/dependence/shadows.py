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

_LARGE_BYTES = 64 * 2**20  # above this size, only the part of a storage that a batch covers is copied


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
    start_byte: int = 0  # where the shadow begins in the real storage
    picked_rows: int | None = None  # rows that values chose one by one, as a mask does


class Shadows:
    """Keeps for each storage what is known about it, and its shadow; entries end with their storage."""

    def __init__(self) -> None:
        # By the address of the storage: views are objects of their own, and a tensor's id may be used again.
        self._entries: dict[int, _Entry] = {}
        self._owned: set[int] = set()  # addresses of shadow storages: each may stand beside one real one alone
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
        if entry.kind is Kind.SHADOW:
            return _placed(entry, tensor)
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
        return _view(self._entries[storage._cdata], tensor)

    def add(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add the tensors of a batch with their changed copies; several of them may share one storage."""
        spans: dict[int, tuple[int, int]] = {}
        pairs = list(pairs)
        for real, _ in pairs:
            key = self.key(real)
            if key is not None:
                start, end = _span(real)
                known = spans.get(key, (start, end))
                spans[key] = (min(start, known[0]), max(end, known[1]))
        for real, shadow in pairs:
            key = self.key(real)
            if key is None:
                self._objects[real] = shadow
                continue
            if self.kind(real) is not Kind.SHADOW:
                self._copy_storage(real, spans[key])
            _write(self.of(real), shadow)

    def start(self, tensor: Tensor) -> None:
        """Give a tensor's storage a shadow that is still equal to it, if it has none."""
        if self.kind(tensor) is not Kind.SHADOW and _storage(tensor) is not None:
            self._copy_storage(tensor, None)

    def adopt(self, real: Tensor, shadow: Tensor) -> None:
        """Take what an operation returned for shadows as the shadow of what it returned for the real tensors."""
        storage = _storage(real)
        made = _storage(shadow)
        if storage is None or made is None:
            self._objects[real] = shadow
            return
        if storage._cdata == made._cdata:
            return  # both are views of one real tensor, which has no shadow
        entry = self._entries.get(storage._cdata)
        if entry is not None and entry.kind is Kind.SHADOW:
            view = _view(entry, real)
            if entry.shadow is None or made._cdata != entry.shadow._cdata or view.stride() != shadow.stride():
                _write(view, shadow)
            return
        # A result that lies in memory as the real one does is taken over; any other is copied, as is one whose storage
        # is the shadow of another already.
        same = real.stride() == shadow.stride() and real.storage_offset() == shadow.storage_offset()
        same = same and real.is_conj() == shadow.is_conj() and real.is_neg() == shadow.is_neg()
        if same and storage.nbytes() == made.nbytes() and made._cdata not in self._owned:
            self._set(storage, Kind.SHADOW, made)
        else:
            self.start(real)
            _write(self.of(real), shadow)

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
            self._disown(self._entries.pop(key))

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._owned.clear()
        self._objects.clear()

    def _set(self, storage: torch.UntypedStorage, kind: Kind, shadow: torch.UntypedStorage | None) -> None:
        before = self._entries.get(storage._cdata)
        if before is not None:
            self._disown(before)
        alive = StorageWeakRef(storage) if before is None else before.alive  # type: ignore[no-untyped-call]
        self._entries[storage._cdata] = _Entry(alive, kind, shadow)
        if shadow is not None:
            self._owned.add(shadow._cdata)

    def _disown(self, entry: _Entry) -> None:
        if entry.shadow is not None:
            self._owned.discard(entry.shadow._cdata)

    def _copy_storage(self, tensor: Tensor, span: tuple[int, int] | None) -> None:
        storage = tensor.untyped_storage()
        start = 0
        end = storage.nbytes()
        if span is not None and end > max(_LARGE_BYTES, 2 * (span[1] - span[0])):
            start = span[0] // 64 * 64  # a slice of a whole data set; aligned for every dtype
            end = span[1]
        as_bytes = torch.empty(0, dtype=torch.uint8, device=storage.device)
        shadow = as_bytes.set_(storage, start, (end - start,), (1,)).clone().untyped_storage()
        self._set(storage, Kind.SHADOW, shadow)
        self._entries[storage._cdata].start_byte = start


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return None
    return tensor.untyped_storage()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of its storage that a tensor uses, and the one after the last."""
    first = tensor.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = last + 1 if tensor.numel() else first
    return int(first) * tensor.element_size(), int(end) * tensor.element_size()


def _placed(entry: _Entry, tensor: Tensor) -> Kind:
    """Tell whether a view lies inside the part of the storage that has a shadow."""
    start, end = _span(tensor)
    have = entry.start_byte
    length = 0 if entry.shadow is None else entry.shadow.nbytes()
    # Outside of what was copied of a large storage lies what no batch covers.
    if start == end or end <= have or (start >= have + length and have > 0):
        return Kind.PLAIN
    return Kind.SHADOW if start >= have and end <= have + length else Kind.UNKNOWN


def _view(entry: _Entry, tensor: Tensor) -> Tensor:
    assert entry.shadow is not None
    offset = tensor.storage_offset() - entry.start_byte // tensor.element_size()
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    view.set_(entry.shadow, offset, tensor.size(), tensor.stride())
    if tensor.is_conj():
        view = view.conj()
    return torch._neg_view(view) if tensor.is_neg() else view


def _write(view: Tensor, values: Tensor) -> None:
    """Copy values into a view; where it repeats its memory (``expand``), the first of the repeated ones."""
    for dim, stride in enumerate(view.stride()):
        if stride == 0 and view.shape[dim] > 1:
            view = view.narrow(dim, 0, 1)
            values = values.narrow(dim, 0, 1)
    view.copy_(values)
