"""Step 0 of a batch: how many samples it holds, and how to take some of them.

A batch may be any nesting of tensors, lists, tuples, named tuples, dicts, ``UserDict`` and dataclasses.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection, is_namedtuple
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["BatchError", "batch_size_of", "first_input", "select_batch"]

_COLUMN_TYPES = (str, bytes, int, float, bool, type(None))


class BatchError(ValueError):
    """A batch has no recognisable batch dimension; the message says what to override."""


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def visit(leaf: Any) -> None:
        if isinstance(leaf, PackedSequence):
            raise BatchError(
                "a PackedSequence has no batch dimension to index: override `select_batch(batch, indices)` and "
                "`per_sample_loss(batch, batch_idx)` on your module."
            )
        found.append(leaf)

    apply_to_collection(batch, (Tensor, PackedSequence), visit)
    return found


def batch_size_of(batch: Any) -> int:
    """Number of samples in ``batch``: the most common leading dimension of its tensors (ties: the first tensor's).

    Args:
        batch: any nesting of tensors; tensors without dimensions are ignored.

    Returns:
        The batch size B, at least 1.

    Raises:
        BatchError: no tensor with a leading dimension was found, or the leading dimension is 0.

    Example:
        >>> batch_size_of({"image": torch.zeros(8, 3, 4, 4), "label": torch.zeros(8), "scale": torch.tensor(2.0)})
        8
    """
    leading = [t.shape[0] for t in _tensors(batch) if t.ndim > 0]
    if not leading:
        raise BatchError(
            f"expected a batch that holds tensors of shape (B, ...), got {type(batch).__name__} without any. "
            "Override `select_batch(batch, indices)` and `per_sample_loss(batch, batch_idx)` on your module."
        )
    size = Counter(leading).most_common(1)[0][0]
    if size == 0:
        raise BatchError("expected at least one sample in the batch, got a leading dimension of 0.")
    return int(size)


def first_input(batch: Any, batch_size: int) -> Tensor | None:
    """The first floating-point tensor of ``batch`` with leading dimension ``batch_size``, e.g. the images; or None."""
    for tensor in _tensors(batch):
        if tensor.ndim > 0 and tensor.shape[0] == batch_size and tensor.is_floating_point():
            return tensor
    return None


def select_batch(batch: Any, indices: Tensor) -> Any:
    """Take the samples ``indices`` out of ``batch``, keeping its structure.

    Tensors whose leading dimension is the batch size are indexed; so are lists and tuples of B strings, numbers or
    ``None`` (what the default collate makes of non-tensor fields). Everything else is passed through. A tensor
    whose batch dimension is not the first (time-major sequences) or ragged structures (graphs, packed sequences)
    need an override of ``select_batch`` on the module.

    Args:
        batch: any nesting of tensors, lists, tuples, named tuples, dicts, ``UserDict`` and dataclasses.
        indices: ``(k,)`` integer positions in the batch.

    Returns:
        A new batch of k samples; the given one is not changed.

    Raises:
        BatchError: no tensor has the batch size as its leading dimension, or the batch holds a ``PackedSequence``.

    Example:
        >>> select_batch((torch.arange(4), ["a", "b", "c", "d"], 7), torch.tensor([2, 0]))
        (tensor([2, 0]), ['c', 'a'], 7)
    """
    size = batch_size_of(batch)
    positions = indices.tolist() if _has_columns(batch) else []
    on_device: dict[torch.device, Tensor] = {}

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0 or leaf.shape[0] != size:
                return leaf
            if leaf.device not in on_device:
                on_device[leaf.device] = indices.to(leaf.device)
            return leaf.index_select(0, on_device[leaf.device])
        if _is_column(leaf, size):
            return type(leaf)(leaf[i] for i in positions)
        taken = [apply_to_collection(value, (Tensor, list, tuple), take) for value in leaf]
        return type(leaf)(*taken) if is_namedtuple(leaf) else type(leaf)(taken)

    return apply_to_collection(batch, (Tensor, list, tuple), take)


def _is_column(leaf: Any, size: int) -> bool:
    return len(leaf) == size and all(isinstance(value, _COLUMN_TYPES) for value in leaf)


def _has_columns(batch: Any) -> bool:
    """Whether non-tensor fields are indexed too: then the positions are read, which waits for the device."""
    found = False

    def visit(leaf: Any) -> Any:
        nonlocal found
        found = found or any(isinstance(value, _COLUMN_TYPES) for value in leaf)
        for value in leaf:
            apply_to_collection(value, (list, tuple), visit)
        return leaf

    apply_to_collection(batch, (list, tuple), visit)
    return found
