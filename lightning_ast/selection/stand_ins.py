"""Replace values of a batch in place, for the length of a step: Lightning's hooks cannot replace the batch itself."""

from __future__ import annotations

from collections import UserDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lightning_ast.core.batch.containers import children_of

__all__ = ["StandIns"]


class StandIns:
    """Puts the values of a second batch into the objects of a first one, and takes them out again."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, batch: Any, other: Any) -> None:
        """Put the values of another batch of the same structure in place until :meth:`restore`."""
        # Tensors stay the same objects and get other memory: their own, which may be the dataset's, is never written
        # to. Arrays, numbers and tuples are replaced in the list or dict that holds them; where none does, an array
        # whose memory is its own is written to.
        if batch is other:
            return
        if isinstance(batch, Tensor):
            self._swap_data(batch, other)
        elif isinstance(batch, np.ndarray):
            self._overwrite(batch, other)
        elif isinstance(batch, (list, deque, dict, UserDict)):
            for key in range(len(batch)) if isinstance(batch, (list, deque)) else batch:
                self._put_item(batch, key, other[key])
        else:
            for old, new in zip(children_of(batch) or (), children_of(other) or (), strict=False):
                self.put(old, new)

    def restore(self) -> None:
        """Give the batch its own values back. Safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def _put_item(self, holder: Any, key: Any, new: Any) -> None:
        old = holder[key]
        if isinstance(old, (np.ndarray, int, float, tuple)):
            self._undo.append(partial(holder.__setitem__, key, old))
            holder[key] = new
        else:
            self.put(old, new)

    def _swap_data(self, old: Tensor, new: Tensor) -> None:
        if old.is_nested:  # its lengths stay: only the values are put right
            if old.layout is not torch.jagged:
                return
            old = cast(Tensor, old._values)
            new = old.nan_to_num(0.0, 0.0, 0.0)
        data = old.data
        try:
            old.data = new
        except (RuntimeError, TypeError):  # a class or a layout whose memory cannot be exchanged
            return
        # Whoever holds the tensor sees the new values, and `requires_grad`, hooks and identity stay.
        self._undo.append(partial(setattr, old, "data", data))

    def _overwrite(self, old: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> None:
        if old.flags.owndata and old.flags.writeable:
            self._undo.append(partial(np.copyto, old, old.copy()))
            np.copyto(old, new)
