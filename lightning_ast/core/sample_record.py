"""Before a batch, in mode ``prune``: what is kept of each sample beside its last score, for the user to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SampleRecord"]

_UNKNOWN = -1
_MOST = torch.iinfo(torch.int16).max


class SampleRecord:
    """How often each sample was trained on, its class, and its significance in the latest epochs.

    It takes 2 bytes a sample, 4 for the class where ``labels`` are wanted, and 2 for each of the latest ``epochs``.
    """

    def __init__(self, size: int, *, epochs: int = 0, labels: bool = False) -> None:
        self._times = torch.zeros(size, dtype=torch.int16)
        self._labels = torch.full((size,), _UNKNOWN, dtype=torch.int32) if labels else None
        self._most_epochs = epochs
        self._epochs: dict[int, Tensor] = {}
        self._epoch = 0

    def count(self, indices: Tensor, *, epoch: int) -> None:
        """Count the samples of a batch, ``(B,)`` dataset indices on the CPU, as trained on in an epoch."""
        self._epoch = epoch
        self._times.index_add_(0, indices, torch.ones_like(indices, dtype=torch.int16))

    def tell(self, indices: Tensor, labels: Tensor | None) -> None:
        """Keep the classes ``(B,)`` of the samples of a batch; a negative one, or None, is not known."""
        if self._labels is None or labels is None:
            return
        if self._labels.device != labels.device:  # where the classes are told: no batch waits
            self._labels = self._labels.to(labels.device)
        indices = indices.to(labels.device, non_blocking=True)
        self._labels[indices] = labels.clamp_min(_UNKNOWN).int()

    def classes_of(self, indices: Tensor) -> Tensor | None:
        """Return the classes of some dataset indices ``(n,)``, -1 where not known; None where none is kept."""
        return None if self._labels is None else self._labels.cpu()[indices].long()

    def fold(self, recent: Tensor, maximum: Callable[[Tensor], Tensor] | None = None) -> None:
        """Keep the scores of the epoch that has ended, ``(N,)`` with -1 for the samples that it did not train on."""
        self._labels = self._all_labels(maximum)
        if self._most_epochs and bool((recent >= 0).any()):
            self._epochs[self._epoch] = recent.bfloat16()
            while len(self._epochs) > self._most_epochs:
                del self._epochs[min(self._epochs)]

    def _all_labels(self, maximum: Callable[[Tensor], Tensor] | None) -> Tensor | None:
        return self._labels if self._labels is None or maximum is None else maximum(self._labels)

    def state_dict(
        self,
        total: Callable[[Tensor], Tensor] | None = None,
        maximum: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Any]:
        """Return primitives and tensors alone; ``total`` and ``maximum`` are those over the processes."""
        # A count above the largest int16 has become negative; to find it here spares each batch a second look.
        times = self._times.int().where(self._times >= 0, _MOST)
        times = times if total is None else total(times)
        labels = self._all_labels(maximum)
        return {
            "times": times.clamp_max(_MOST),
            "labels": None if labels is None else labels.cpu().clone(),
            "epochs": dict(self._epochs),
            "epoch": self._epoch,
            "keeps_epochs": self._most_epochs,
        }

    def load_state_dict(self, state: dict[str, Any], *, first: bool = True) -> None:
        """Restore what :meth:`state_dict` gave; the counts, which are those of all, in the ``first`` process alone."""
        if first:
            self._times = state["times"].clamp_max(_MOST).short()
        if self._labels is not None and state["labels"] is not None:
            self._labels = state["labels"].clone()
        kept = sorted(state["epochs"])[-self._most_epochs :] if self._most_epochs else []
        self._epochs = {epoch: state["epochs"][epoch] for epoch in kept}
        self._epoch = state["epoch"]
