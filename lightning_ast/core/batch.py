"""Step 0 of a batch: how many samples it holds, and how to take some of them.

A batch may be any nesting of tensors, arrays, lists, tuples, named tuples, dicts, ``UserDict`` and dataclasses.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["BatchError", "EmptyBatchError", "batch_size_of", "first_input", "select_batch"]


class BatchError(ValueError):
    """A batch has no recognisable batch dimension; the message says what to override."""


class EmptyBatchError(BatchError):
    """A batch holds no sample."""


def batch_size_of(batch: Any) -> int:
    """Number of samples in ``batch``: the most common leading dimension of its tensors (ties: the first tensor's).

    A list of dicts with the same keys, each with a scalar (``collate_fn=list``), holds one sample a dict.

    Args:
        batch: any nesting of tensors; tensors without dimensions are ignored.

    Returns:
        The batch size B, at least 1.

    Raises:
        EmptyBatchError: The leading dimension is 0, or there is nothing in the batch.
        BatchError: No tensor with a leading dimension was found.

    Example:
        >>> batch_size_of({"image": torch.zeros(8, 3, 4, 4), "label": torch.zeros(8), "scale": torch.tensor(2.0)})
        8
    """
    if _is_list_of_samples(batch):
        return len(batch)
    leading = [t.shape[0] for t in _tensors(batch) if t.ndim > 0]
    if not leading:
        empty = isinstance(batch, (list, tuple, Mapping)) and len(batch) == 0
        raise (EmptyBatchError if empty else BatchError)(
            f"expected a batch that holds tensors of shape (B, ...), got {type(batch).__name__} without any. Use "
            "SparseLossMixin and override `count_samples(batch)` and `select_batch(batch, indices)`."
        )
    alike = leading.count(leading[0]) == len(leading)  # quicker than counting each
    size = leading[0] if alike else Counter(leading).most_common(1)[0][0]
    if size == 0:
        raise EmptyBatchError("expected at least one sample in the batch, got a leading dimension of 0.")
    return int(size)


def first_input(batch: Any, batch_size: int) -> Tensor | None:
    """The first floating-point tensor of ``batch`` with leading dimension ``batch_size``, e.g. the images; or None."""
    if _is_list_of_samples(batch):
        return None
    try:
        return next((t for t in _tensors(batch) if _has_rows(t, batch_size) and t.is_floating_point()), None)
    except BatchError:
        return None


def select_batch(batch: Any, indices: Tensor, *, batch_size: int | None = None) -> Any:
    """Take the samples ``indices`` out of ``batch``, keeping its structure.

    Tensors and arrays whose leading dimension is the batch size are indexed. So are lists and tuples of B entries of
    which fewer than half (of the batch itself: none) hold such a tensor: names, paths, one dict or one ragged tensor a
    sample. Everything else is passed through. A tensor whose batch dimension is not the first (time-major sequences),
    graphs and packed sequences need an override of ``select_batch`` (and ``count_samples``) on the module.

    Args:
        batch: any nesting of tensors, arrays, lists, tuples, named tuples, dicts, ``UserDict`` and dataclasses.
        indices: ``(k,)`` integer positions in the batch.
        batch_size: B where it is known; None takes :func:`batch_size_of`.

    Returns:
        A new batch of k samples; the given one is not changed.

    Raises:
        BatchError: no tensor has a leading dimension, or the batch holds a ``PackedSequence``.

    Example:
        >>> select_batch((torch.arange(4), ["a", "b", "c", "d"], 7), torch.tensor([2, 0]))
        (tensor([2, 0]), ['c', 'a'], 7)
    """
    size = batch_size_of(batch) if batch_size is None else batch_size
    return _Slicer(batch, indices, size).take(batch)


class _Slicer:
    """Takes rows out of nested structures; positions are read from the device only where a list needs them."""

    def __init__(self, batch: Any, indices: Tensor, size: int) -> None:
        self._batch = batch
        self._on_device = {indices.device: indices}
        self._indices = indices
        self._size = size

    def take(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.index_select(0, self._at(part.device)) if _has_rows(part, self._size) else part
        if isinstance(part, (list, tuple)):
            return self._sequence(part)
        if isinstance(part, Mapping):
            return self._mapping(part)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return self._dataclass(part)
        if type(part).__module__ == "numpy" and getattr(part, "shape", ())[:1] == (self._size,):
            return part[self._indices.tolist()]
        return part

    def _sequence(self, part: Any) -> Any:
        if hasattr(part, "_fields"):  # a named tuple
            return type(part)(*map(self.take, part))
        with_rows = sum(any(_has_rows(t, self._size) for t in _tensors(entry)) for entry in part)
        few = with_rows == 0 if part is self._batch else 2 * with_rows < self._size
        few = few or (part is self._batch and _is_list_of_samples(part))
        if len(part) == self._size and few:
            return type(part)(part[i] for i in self._indices.tolist())
        return type(part)(map(self.take, part))

    def _mapping(self, part: Any) -> Any:
        items = {key: self.take(part[key]) for key in part}
        if isinstance(part, (UserDict, defaultdict)):  # these copy themselves; their constructors vary
            taken = copy.copy(part)
            taken.update(items)
            return taken
        try:
            return type(part)(items)
        except TypeError as error:
            raise BatchError(
                f"a {type(part).__name__} cannot be made from a dict: use SparseLossMixin and override "
                "`select_batch(batch, indices)`."
            ) from error

    def _dataclass(self, part: Any) -> Any:
        taken = copy.copy(part)
        for field in dataclasses.fields(part):
            object.__setattr__(taken, field.name, self.take(getattr(part, field.name)))  # frozen ones too
        return taken

    def _at(self, device: torch.device) -> Tensor:
        if device not in self._on_device:
            self._on_device[device] = self._indices.to(device)
        return self._on_device[device]


def _is_list_of_samples(batch: Any) -> bool:
    """``collate_fn=list``: several dicts with the same keys, each with a scalar: what a whole batch's dict has not."""
    if not isinstance(batch, (list, tuple)) or len(batch) < 2 or not all(isinstance(s, Mapping) for s in batch):
        return False
    return all(s.keys() == batch[0].keys() and any(map(_is_scalar, s.values())) for s in batch)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and value.ndim == 0)


def _has_rows(tensor: Tensor, size: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == size


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, PackedSequence):
        raise BatchError(
            "a PackedSequence has no batch dimension to index: use SparseLossMixin and override `count_samples(batch)` "
            "and `select_batch(batch, indices)`."
        )
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from _tensors(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield from _tensors(getattr(part, field.name))
