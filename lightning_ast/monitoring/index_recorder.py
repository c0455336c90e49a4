"""The dataset indices of each batch, where the loader can tell: they are recorded as the sampler yields them."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, default_collate, default_convert

from lightning_ast.lightning_internals.class_patch import change_class
from lightning_ast.lightning_internals.fit_loop import batches_handed
from lightning_ast.lightning_internals.leading import lead
from lightning_ast.lightning_internals.resuming import knows_its_place
from lightning_ast.monitoring.guard import Guard
from lightning_ast.pruning.loader import loader_faults

__all__ = ["DrawnIndices"]


class DrawnIndices:
    """A listener to the user's sampler; it finds the part of what was drawn that a batch was made of."""

    def __init__(self, owner: Callback, trainer: pl.Trainer) -> None:
        self._owner = owner
        self._trainer = trainer
        self._guard = Guard("listening to the sampler")
        self._drawn = array("q")
        self._batch_size: int | None = None
        self._loader: Any = None
        self._sampler: Any = None
        self._undo: Callable[[], None] | None = None
        self._put_back: Callable[[], None] | None = None

    def attach(self) -> None:
        """Listen to every training loader that Lightning sets up from here on."""
        self._undo = lead(self._trainer.fit_loop, load=self._load, begin=lambda epoch: None)

    def detach(self) -> None:
        """Leave trainer and sampler as they were. Safe to call twice."""
        self._let_go()
        if self._undo is not None:
            self._undo()
        self._undo = None

    def take(self, batch_size: int) -> Tensor | None:
        """Return the dataset indices ``(B,)`` of the batch that was handed out last; None where they are not known."""
        if self._batch_size is None or self._loader.batch_sampler.sampler is not self._sampler:
            return None
        # With workers the sampler is ahead of the batches: a batch's place is found by counting those handed out.
        start = (batches_handed(self._trainer.fit_loop) - 1) * self._batch_size
        drawn = self._drawn[start : start + self._batch_size]
        return torch.tensor(drawn) if start >= 0 and len(drawn) == batch_size else None

    def _load(self, combined: CombinedLoader) -> CombinedLoader:
        self._let_go()
        with self._guard():
            self._listen(combined)
        return combined

    def _listen(self, combined: CombinedLoader) -> None:
        # What hinders pruning hinders this too: several loaders, no fixed order.
        watched = self._owner in self._trainer.callbacks  # type: ignore[attr-defined]
        if watched and not loader_faults(combined, processes=self._trainer.world_size):
            loader = combined.flattened[0]
            # Places are counted in batches of one size, from the start of an epoch.
            if type(loader.batch_sampler) is not BatchSampler or knows_its_place(loader):
                return
            self._loader = loader
            self._sampler = self._loader.batch_sampler.sampler
            own = type(self._sampler)
            if isinstance(getattr(self._sampler, "__dict__", None), dict):  # a list, say, cannot be listened to
                # The loader stays the user's own: a sampler in its place would be seen by their code, and pickled.
                self._put_back = change_class(self._sampler, {"__iter__": lambda sampler: self._draw(own, sampler)})

    def _let_go(self) -> None:
        if self._put_back is not None:
            self._put_back()
        self._put_back = self._loader = self._sampler = self._batch_size = None

    def _draw(self, own: Any, sampler: Any) -> Iterator[Any]:
        """Yield an epoch's indices and record them, with the loader's settings as they are at its start."""
        # A tuner may change them between two starts. Samples that a collate_fn may put in another order are not known.
        drawn = self._drawn = array("q")
        self._batch_size = self._loader.batch_sampler.batch_size if _keeps_order(self._loader.collate_fn) else None
        for index in own.__iter__(sampler):
            try:
                drawn.append(operator.index(index))
            except Exception:  # a key, several indices at once, more than 64 bits: no place in a data set
                self._batch_size = None
            yield index


def _keeps_order(collate: Any) -> bool:
    if collate in (default_collate, default_convert):
        return True
    samples = [object()]
    try:
        return collate(samples) is samples
    except Exception:  # it wants to look at them, which tells nothing of their order
        return False
