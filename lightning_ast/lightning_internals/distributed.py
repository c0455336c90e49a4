"""What the processes that train together tell each other."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.words import counted

__all__ = ["Processes"]


class Processes:
    """The processes of a run; every method that communicates is called by all of them, or by none.

    Args:
        trainer: its strategy communicates.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy = trainer.strategy
        self._state = trainer.state
        self.count = trainer.world_size
        self.rank = trainer.global_rank

    def mean(self, value: Tensor) -> Tensor:
        """Element-wise mean over the processes."""
        return self._reduced(value, "mean")

    def mean_of(self, *values: float) -> list[float]:
        """Means of numbers over the processes."""
        return list(values) if self.count == 1 else self.mean(torch.tensor(values)).tolist()

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

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, by rank; it is pickled."""
        if self.count == 1:
            return [value]
        everyone: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def share(self, values: Tensor) -> Tensor:
        """The part of an interleaved ``(n * count,)`` that is this process's: ``(n,)``."""
        return values[self.rank :: self.count]

    @property
    def failing(self) -> bool:
        """Whether the run is being interrupted: a process that failed speaks alone."""
        return self._state.status == TrainerStatus.INTERRUPTED

    def random_states(self) -> list[dict[str, Any]]:
        """The state of the global generators of each process by rank; of this one alone where the run fails."""
        own = _random_state()
        return [own] if self.failing else self.gathered(own)

    def restore_random_states(self, states: list[dict[str, Any]]) -> None:
        """Put each process's global generators where :meth:`random_states` found them."""
        if len(states) == self.count:
            _restore_random_state(states[self.rank])
            return
        rank_zero_warn(
            f"lightning-ast: this checkpoint holds the random state of {counted(len(states), 'process')}, for "
            f"{self.count}: it was written with another number of them, or by one alone while the run "
            "failed. Training goes on, but not bit for bit as it would have."
        )


def _random_state() -> dict[str, Any]:
    """State of this process's global generators (torch on CPU and GPU, numpy, Python): primitives and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), torch.tensor(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(internal), gauss],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    """Put the global generators where :func:`_random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
