"""Before a batch, in mode ``prune``: how many samples a pruned epoch has, whatever their significance."""

from __future__ import annotations

import math

from lightning_ast.core.gate import minimum_count

__all__ = ["even_count", "planned_count"]

_ROUNDING = 0.005
"""Largest relative change of the rate for the sake of whole batches."""
_LEAST_BATCH = 8


def planned_count(
    offered: int,
    rate: float,
    *,
    batch_size: int,
    processes: int = 1,
    drop_last: bool = False,
    min_selected: int | float = 1,
    at_least: bool = False,
) -> int:
    """Count the samples of a pruned epoch before it begins, whatever their significance: schedules are planned by it.

    Args:
        offered: The number of samples of a dense epoch, over all processes.
        rate: The target activation rate in (0, 1].
        batch_size: The number of samples in a batch of one process.
        processes: The number of processes that train together; each gets as many samples.
        drop_last: Whether the loader drops a last short batch.
        min_selected: The fewest samples, a count or a share of the epoch.
        at_least: Whether a number of whole batches is rounded up and not to the nearest.

    Returns:
        A multiple of ``processes``, at most ``offered``: whole batches where that moves the rate by at most 0.5 % of
        itself (always with ``drop_last``), else the exact rate, without a last batch of a single sample.

    Example:
        >>> planned_count(50_000, 0.4, batch_size=256), planned_count(1_000, 0.333, batch_size=64)
        (19968, 333)
    """
    whole = batch_size * processes
    wanted = max(rate * offered, minimum_count(offered, min_selected))
    rounded = max(1, math.ceil(wanted / whole) if at_least else round(wanted / whole)) * whole
    # With drop_last, samples of a planned last batch that is short would be thrown away.
    if rounded <= offered and (drop_last or abs(rounded - wanted) <= _ROUNDING * wanted):
        return rounded
    each = max(1, round(wanted / processes))
    # BatchNorm cannot train on a last batch of one sample: add one or leave it out.
    if each % batch_size == 1 and batch_size > 1:
        each += 1 if each == 1 or each * processes < wanted else -1
    return min(each * processes, offered)


def even_count(
    offered: int, rate: float, *, batches: int, batch_size: int, processes: int = 1, min_selected: int | float = 1
) -> int:
    """Count the samples of a pruned epoch that has as many batches as a dense one, each of a share of the samples.

    Args:
        offered: The number of samples of a dense epoch, over all processes.
        rate: The target activation rate in (0, 1].
        batches: The number of batches of an epoch in one process. None has fewer than 8 samples, or than a dense one.
        batch_size: The number of samples in a batch of a dense epoch, in one process.
        processes: The number of processes that train together; each gets as many samples.
        min_selected: The fewest samples, a count or a share of the epoch.

    Returns:
        A multiple of ``processes``, at most ``offered``.

    Example:
        >>> even_count(50_000, 0.4, batches=196, batch_size=256), even_count(256, 0.1, batches=16, batch_size=16)
        (20000, 128)
    """
    wanted = max(rate * offered, minimum_count(offered, min_selected))
    # The noise of smaller batches outweighs what a step saves, above all with BatchNorm.
    each = max(round(wanted / processes), batches * min(_LEAST_BATCH, batch_size))
    return min(each * processes, offered)
