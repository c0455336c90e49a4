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
from lightning_ast.lightning_internals.leading import make_iterator

__all__ = ["ENDLESS", "CachedBatches", "CachedLoader", "read", "steady_period"]

MOST_BATCHES = 8
MOST_BYTES = 1 << 29
_ENOUGH = 24
ENDLESS = 1 << 40
"""Batches of an epoch that is ended from within; a number, for code that reckons with it."""

Clock = Callable[[], float]


def steady_period(arrivals: list[float], workers: int, fetched_ahead: int) -> float:
    """Return the seconds from batch to batch of a loader that is read as fast as it goes.

    Workers deliver in bursts, one batch each: a window of whole bursts has the period. What was fetched ahead, before
    the reader began to wait, is left out where enough batches follow.

    Args:
        arrivals: The time of each batch, in seconds, and before them the time when the first was asked for.
        workers: The number of processes that load.
        fetched_ahead: The batches that were asked for at once at the start.

    Returns:
        The seconds, >= 0; of a single batch the time that it took.

    Example:
        >>> steady_period([0.0, 3.0, 4.0, 5.0], workers=0, fetched_ahead=0)
        1.0
        >>> steady_period([0.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0], workers=2, fetched_ahead=4)  # 2 s each, two at a time
        1.0
    """
    if len(arrivals) == 2:
        return arrivals[1] - arrivals[0]
    times = arrivals[1:]
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
    """Iterate the user's loader for a while, and keep its first batches.

    Args:
        combined: The loaders as Lightning has set them up; their workers are stopped afterwards.
        seconds: The time to read for, unless enough batches have come; two are read in any case.
        clock: Returns the time in seconds.
        count: Returns the batch size of a batch.

    Returns:
        The facts, and at most 8 batches of the same size that take at most 512 MiB, at least one.

    Raises:
        AdviceError: The loader is empty.
    """
    workers, ahead, restarts = _workers(combined)
    begin = clock()
    arrivals = [begin]
    kept = list[Any]()
    used = 0
    for batch, *_ in iter(combined):
        arrivals.append(clock())
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
    """The kept batches, given over and over, and the time that it took to give them.

    Args:
        batches: The batches, at least one.
        clock: Returns the time in seconds.
        copies: True where each is a copy: a step that changes its batch in place would change what others get. On an
            accelerator the transfer makes one.

    Attributes:
        position: The index of the batch that comes next; may be set.
        seconds: The time spent here so far, which no training step is to be charged with.
    """

    def __init__(self, batches: list[Any], *, clock: Clock, copies: bool) -> None:
        self._batches = batches
        self._clock = clock
        self._copies = copies
        self.position = 0
        self.seconds = 0.0

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
            if self._copies:
                batch = apply_to_collection(batch, Tensor, torch.clone, allow_frozen=True)
            self.seconds += self._clock() - begin
            yield batch


class CachedLoader(CombinedLoader):
    """A loader that takes the place of the user's in the fit loop.

    Args:
        given: The user's loaders; Lightning asks them for the length of an epoch.
        batches: The batches to train on.
    """

    def __init__(self, given: CombinedLoader, batches: CachedBatches) -> None:
        super().__init__(batches, "max_size_cycle")
        self._given = given

    def __iter__(self) -> CachedLoader:
        """Start, and let the user's loader be asked for the length of an epoch."""
        super().__iter__()
        make_iterator(self._given)
        return self
