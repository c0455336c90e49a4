"""What the processes that train together tell each other."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

__all__ = ["Processes", "random_state", "restore_random_state"]


class Processes:
    """The processes of a run; every method that communicates is called by all of them, or by none.

    Args:
        trainer: its strategy communicates.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy = trainer.strategy
        self.count = trainer.world_size
        self.rank = trainer.global_rank

    def mean(self, value: Tensor) -> Tensor:
        """Element-wise mean over the processes."""
        return self._reduced(value, "mean")

    def maximum(self, value: Tensor) -> Tensor:
        """Element-wise maximum over the processes."""
        return self._reduced(value, "max")

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        if self.count == 1:
            return value
        device = value.device
        reduced = self._strategy.reduce(value.clone().to(self._strategy.root_device), reduce_op=operation)
        return reduced.to(device) if isinstance(reduced, Tensor) else value.new_tensor(reduced)

    def interleaved(self, values: Tensor) -> Tensor:
        """``(n,)`` of each process, taking turns: ``(n * count,)``; :meth:`share` is the inverse."""
        if self.count == 1:
            return values
        own = values.to(self._strategy.root_device)
        everyone = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(everyone, own)
        return torch.stack(everyone, dim=1).reshape(-1).cpu()

    def share(self, values: Tensor) -> Tensor:
        """The part of an interleaved ``(n * count,)`` that is this process's: ``(n,)``."""
        return values[self.rank :: self.count]

    def gathered(self, value: Any) -> list[Any]:
        """Any picklable object of each process, by rank."""
        if self.count == 1:
            return [value]
        everyone: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(everyone, value)
        return everyone


def random_state() -> dict[str, Any]:
    """The state of this process's global generators (torch on CPU and GPU, numpy, Python): primitives and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), torch.tensor(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(internal), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global generators where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
