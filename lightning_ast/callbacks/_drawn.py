"""Which samples of the data set each batch holds, where the loader can tell: indices are noted as they are drawn."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_ast.callbacks._fit_loop import lead
from lightning_ast.callbacks._loader import PrunedLoader, PrunedSampler, loader_faults

__all__ = ["DrawnIndices"]


class DrawnIndices:
    """Passes on what the user's sampler draws, and remembers it until the batch arrives.

    Needs what mode ``prune`` needs of a loader (one torch DataLoader over a map-style dataset, in order); with any
    other nothing is known, and nothing is changed.

    Args:
        owner: the callback that wants to know; a tuner's trials go on without it.
        trainer: of the fit.
    """

    def __init__(self, owner: Callback, trainer: pl.Trainer) -> None:
        self._owner, self._trainer = owner, trainer
        self._queue: deque[int] = deque()
        self._batch_size: int | None = None
        self._undo: Callable[[], None] | None = None

    def attach(self) -> None:
        """From here on, every training loader that Lightning sets up is listened to."""
        self._undo = lead(self._trainer.fit_loop, load=self._load, begin=lambda epoch: None)

    def detach(self) -> None:
        """Leave the trainer as it was. Safe to call twice."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    def take(self, batch_size: int) -> Tensor | None:
        """``(B,)`` dataset indices of the batch that has arrived, or None; called once for each batch, in order."""
        if self._batch_size is None:
            return None
        drawn = [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
        if len(drawn) != batch_size:  # a collate_fn drops or adds samples
            self._batch_size = None
            return None
        return torch.tensor(drawn)

    def _load(self, combined: CombinedLoader) -> CombinedLoader:
        self._batch_size = None
        watched = self._owner in self._trainer.callbacks  # type: ignore[attr-defined]
        if not watched or loader_faults(combined, processes=self._trainer.world_size):
            return combined
        sampler = combined.flattened[0].batch_sampler
        self._batch_size = sampler.batch_size
        length = functools.partial(len, sampler.sampler)
        loader = PrunedLoader(combined, functools.partial(PrunedSampler, indices=self._draw, length=length))
        loader.limits = combined.limits
        return loader

    def _draw(self, sampler: Any) -> Iterator[Any]:
        self._queue.clear()
        for index in islice(sampler, None):
            if not hasattr(index, "__index__"):
                self._batch_size = None
            else:
                self._queue.append(index.__index__())
            yield index
