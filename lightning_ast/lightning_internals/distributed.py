"""The processes of a run, and what they tell each other."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.lightning_internals.random_state import random_state, restore_random_state
from lightning_ast.words import counted

__all__ = ["Processes", "shards_parameters", "starts_processes"]

T = TypeVar("T")


class Processes:
    """The processes of a Trainer's run; every method that communicates is called by all of them, or by none."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._strategy = trainer.strategy
        self._state = trainer.state
        self.count = trainer.world_size
        self.rank = trainer.global_rank

    def mean(self, value: Tensor) -> Tensor:
        """Return the element-wise mean over the processes."""
        return self._reduced(value, "mean")

    def mean_of(self, *values: float) -> list[float]:
        """Return the means of numbers over the processes."""
        return list(values) if self.count == 1 else self.mean(torch.tensor(values)).tolist()

    def maximum(self, value: Tensor) -> Tensor:
        """Return the element-wise maximum over the processes."""
        return self._reduced(value, "max")

    def total(self, value: Tensor) -> Tensor:
        """Return the element-wise sum over the processes."""
        return self._reduced(value, "sum")

    def _reduced(self, value: Tensor, operation: str) -> Tensor:
        if self.count == 1:
            return value
        # NCCL reduces tensors on the GPU alone, while the values that are kept here live on the CPU
        reduced = self._strategy.reduce(value.clone().to(self._strategy.root_device), reduce_op=operation)
        return reduced.to(value.device) if isinstance(reduced, Tensor) else value.new_tensor(reduced)

    def interleaved(self, values: Tensor) -> Tensor:
        """Let the ``(n,)`` of each process take turns: ``(n * count,)``; :meth:`share` is the inverse."""
        if self.count == 1:
            return values
        # In turns, as a DistributedSampler deals them out, so that together they are one order of the epoch.
        own = values.to(self._strategy.root_device)
        everyone = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(everyone, own)
        return torch.stack(everyone, dim=1).reshape(-1).cpu()

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes by rank; they are pickled on the way."""
        if self.count == 1:
            return [value]
        everyone = [value] * self.count
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def collected(self, value: T) -> list[T | None]:
        """Bring the values of all processes to rank 0, one after the other; elsewhere the others' are None."""
        # All at once would need the memory of all of them on the device where the processes exchange.
        everyone: list[T | None] = [None] * self.count
        everyone[self.rank] = value
        if self.rank > 0:
            torch.distributed.send_object_list([value], dst=0)
            return everyone
        for rank in range(1, self.count):
            received: list[Any] = [None]
            torch.distributed.recv_object_list(received, src=rank)
            everyone[rank] = received[0]
        return everyone

    def alone(self) -> Processes:
        """Return what stands for this process without the others: nothing is shared or exchanged."""
        alone = copy.copy(self)
        alone.count = 1
        alone.rank = 0
        return alone

    def share(self, values: Tensor) -> Tensor:
        """Take this process's part ``(n,)`` of an interleaved ``(n * count,)``."""
        return values[self.rank :: self.count]

    @property
    def failing(self) -> bool:
        """Tell whether the run is being interrupted: a process that failed cannot reach the others."""
        return self._state.status == TrainerStatus.INTERRUPTED

    def random_states(self) -> list[dict[str, Any]]:
        """Return the states of the global generators of each process by rank; of this one alone where the run fails."""
        own = random_state()
        # A checkpoint that is written because this process fails is written by it alone.
        return [own] if self.failing else self.gathered(own)

    def restore_random_states(self, states: list[dict[str, Any]]) -> None:
        """Put each process's global generators where :meth:`random_states` found them."""
        if len(states) == self.count:  # else there is no telling which state is whose
            restore_random_state(states[self.rank])
            return
        rank_zero_warn(
            f"lightning-ast: this checkpoint holds the random state of {counted(len(states), 'process')}, for "
            f"{self.count}: it was written with another number of them, or by one alone while the run "
            "failed. Training goes on, but not bit for bit as it would have."
        )


def starts_processes(trainer: pl.Trainer) -> bool:
    """Tell whether the strategy trains in processes that it starts, be it a single one."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def shards_parameters(trainer: pl.Trainer) -> bool:
    """Tell whether each process holds a part of every parameter, which is gathered for the time of a layer's run."""
    return isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
