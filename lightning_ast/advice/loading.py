"""The training loader: how fast it gives batches, and a few of them kept to train on without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_ast.advice.measured import LoadingFacts
from lightning_ast.errors import AdviceError

__all__ = ["ENDLESS", "CachedBatches", "read", "steady_period"]

MOST_BATCHES = 8
MOST_BYTES = 1 << 29
_ENOUGH = 24
# Batches of an epoch that is ended from within. Not infinity: a length must be an int, and Lightning takes remainders.
ENDLESS = 1 << 40

Clock = Callable[[], float]


def steady_period(arrivals: list[float], workers: int, fetched_ahead: int) -> float:
    """Return the seconds between batches, from the times when the first was asked for, and when each came."""
    if len(arrivals) == 2:
        return arrivals[1] - arrivals[0]
    times = arrivals[1:]
    # Workers deliver in bursts, one batch each: only a window of whole bursts has the period. What was fetched ahead
    # came before the reader began to wait, and is left out where enough batches follow.
    burst = max(1, workers)
    window = len(times) - 1
    settled = window - fetched_ahead
    for length in (settled, window):
        if length >= burst:
            window = length // burst * burst
            break
    return (times[-1] - times[-1 - window]) / window


def read(
    combined: CombinedLoader, *, seconds: float, clock: Clock, count: Callable[[Any], int]
) -> tuple[LoadingFacts, list[Any]]:
    """Iterate the user's loader for some seconds or enough batches; return its facts, and a few batches of one size."""
    workers, ahead, restarts = _workers(combined)
    begin = clock()
    arrivals = [begin]
    kept = list[Any]()
    used = 0
    for batch, *_ in iter(combined):
        arrivals.append(clock())
        # only batches of one size are kept: their steps are compared with each other
        used += sum(t.numel() * t.element_size() for t in tree_leaves(batch) if isinstance(t, Tensor))
        if len(kept) < MOST_BATCHES and (not kept or (used <= MOST_BYTES and count(batch) == count(kept[0]))):
            kept.append(batch)
        late = arrivals[-1] - begin >= seconds and len(arrivals) > 2
        if late or len(arrivals) > ahead + max(_ENOUGH, 4 * workers):
            break
    combined.reset()  # workers that go on loading would slow the steps that are measured next
    if not kept:
        raise AdviceError("the training loader gives no batch: advise needs at least one to measure on.")
    period = steady_period(arrivals, workers, ahead)
    start = max(0.0, arrivals[1] - arrivals[0] - period)
    return LoadingFacts(period, start, workers, restarts, len(arrivals) - 1), kept


def _workers(combined: CombinedLoader) -> tuple[int, int, bool]:
    """Return the workers of all loaders, the batches that they fetch ahead, and whether each epoch starts them anew."""
    workers = ahead = 0
    restarts = False
    for loader in combined.flattened:
        own = getattr(loader, "num_workers", 0)
        workers = max(workers, own)
        ahead = max(ahead, own * (getattr(loader, "prefetch_factor", None) or 0))
        restarts = restarts or (own > 0 and not getattr(loader, "persistent_workers", False))
    return workers, ahead, restarts


class CachedBatches:
    """The kept batches, given over and over; with ``copies`` each is cloned."""

    def __init__(self, batches: list[Any], *, clock: Clock, copies: bool) -> None:
        self._batches = batches
        self._clock = clock
        self._copies = copies
        self.position = 0  # of the batch that comes next; each block of steps sets it
        self.seconds = 0.0  # spent here, which no training step is to be charged with

    @property
    def last(self) -> int:
        """Return which of the kept batches was given last."""
        return (self.position - 1) % len(self._batches)

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Any]:
        while True:
            begin = self._clock()
            batch = self._batches[self.position % len(self._batches)]
            self.position += 1
            # a step that changes its batch in place must not change what others get; a transfer to a device copies
            if self._copies:
                batch = apply_to_collection(batch, Tensor, torch.clone, allow_frozen=True)
            self.seconds += self._clock() - begin
            yield batch
