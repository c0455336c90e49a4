"""Replace values of a batch in place, for the length of a step: Lightning's hooks cannot replace the batch itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lightning_ast.core.batch.containers import children_of, leaves_of
from lightning_ast.errors import BatchError

__all__ = ["StandIns"]


class StandIns:
    """Puts the values of a second batch into the objects of a first one, and takes them out again."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, batch: Any, other: Any) -> None:
        """Put the values of another batch of the same structure in place until :meth:`restore`."""
        if not self._swap(batch, other):  # nothing that can be changed holds an array in a tuple: write to its memory
            for old, new in zip(leaves_of(batch), leaves_of(other), strict=False):
                if isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and old.shape == new.shape:
                    self._overwrite(old, new)

    def restore(self) -> None:
        """Give the batch its own values back. Safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def _swap(self, old: Any, new: Any) -> bool:
        """Exchange what a part of the batch holds; return whether that was possible without another part."""
        # Tensors stay the same objects and get other memory: their own, which may be the dataset's, is never written
        # to. Arrays, numbers and tuples are replaced in the list, dict or object that holds them.
        if old is new:
            return True
        if isinstance(old, Tensor):
            return isinstance(new, Tensor) and self._swap_data(old, new)
        before = _slots(old)
        after = _slots(new)
        if before is None or after is None or before.keys() != after.keys():
            return False
        done = [self._swap(part, after[key]) or self._assign(old, key, after[key]) for key, part in before.items()]
        return all(done)

    def _swap_data(self, old: Tensor, new: Tensor) -> bool:
        if old.is_nested:  # its lengths stay: only the values are put right
            if old.layout is not torch.jagged:
                return True
            old = cast(Tensor, old._values)
            new = old.nan_to_num(0.0, 0.0, 0.0)
        data = old.data
        try:
            old.data = new
        except (RuntimeError, TypeError):  # a class or a layout whose memory cannot be exchanged
            return False
        # Whoever holds the tensor sees the new values, and `requires_grad`, hooks and identity stay.
        self._undo.append(partial(setattr, old, "data", data))
        return True

    def _assign(self, holder: Any, key: Any, value: Any) -> bool:
        is_container = isinstance(holder, (list, deque, Mapping))
        if not is_container and not isinstance(key, str):  # a tuple, a TensorDict
            return False
        read: Any = holder.__getitem__ if is_container else partial(getattr, holder)
        write: Any = getattr(holder, "__setitem__", None) if is_container else partial(object.__setattr__, holder)
        if write is None:
            return False
        self._undo.append(partial(write, key, read(key)))
        write(key, value)
        return True

    def _overwrite(self, old: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> None:
        if old is not new and old.flags.owndata and old.flags.writeable:
            self._undo.append(partial(np.copyto, old, old.copy()))
            np.copyto(old, new)


def _slots(part: Any) -> dict[Any, Any] | None:
    """List the places of a container with what they hold; return None for an object that is no container."""
    if isinstance(part, (Tensor, np.ndarray, str, bytes)):
        return None
    try:
        children = children_of(part)
    except BatchError:
        return None
    if children is None:
        return None
    if isinstance(part, Mapping):
        return dict(zip(part.keys(), children, strict=True))
    if isinstance(part, (list, tuple, deque)):
        return dict(enumerate(children))
    cls = type(part)
    names = list(getattr(cls, "__dataclass_fields__", [each.name for each in getattr(cls, "__attrs_attrs__", ())]))
    return dict(zip([name for name in names if hasattr(part, name)] or range(len(children)), children, strict=True))
