"""Before a batch, in mode ``prune``: the size of a plan, and what the user asks of it as rules by dataset index."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ast.core.gate import GateName, Selection, coverage_of, floor_for, minimum_count, with_class_floor
from lightning_ast.core.large_plan import MANY, carried_at, histogram_of, rate_of_many
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.threshold import rate_at_coverage

__all__ = ["PlanRules", "common_rate", "even_count", "plan_by_rules", "planned_count", "rate_to_cover"]

_ROUNDING = 0.005
"""Largest relative change of the rate for the sake of whole batches."""
_LEAST_BATCH = 8
_HALVINGS = 20  # the rate is found within a millionth


@dataclass(frozen=True)
class PlanRules:
    """The rules of a data set of N samples.

    Attributes:
        always: ``(N,)`` bool, the samples that every plan holds; None for no such rule.
        never: ``(N,)`` bool, the samples that no plan holds while there are enough others; None for no such rule.
        class_floor: The share of each class that every plan holds, in [0, 1].
    """

    always: Tensor | None = None
    never: Tensor | None = None
    class_floor: float = 0.0

    def always_among(self, indices: Tensor) -> Tensor | None:
        """Return which of some dataset indices ``(n,)`` every plan holds; None without such a rule."""
        return None if self.always is None else self.always[indices]


def plan_by_rules(
    selector: SampleSelector,
    significance: Tensor,
    *,
    count: int,
    epoch: int,
    always: Tensor | None = None,
    classes: Tensor | None = None,
    class_floor: float = 0.0,
) -> Selection:
    """Choose exactly ``count`` samples of an epoch as :meth:`SampleSelector.plan` does, and keep to the rules.

    The samples ``always``, ``(n,)`` bool, are kept for certain; with more of them than ``count`` the most significant.
    Of the ``classes``, ``(n,)`` indices that are negative where not known, each keeps a share as far as ``count``
    allows.
    """
    if always is None and (classes is None or class_floor == 0):
        return selector.plan(significance, count=count, epoch=epoch)  # which tells rate and coverage itself
    certain = torch.zeros_like(significance, dtype=torch.bool) if always is None else always
    kept = _beside_certain(selector, significance, certain, count=count, epoch=epoch)
    if classes is not None and class_floor > 0 and count < significance.numel():
        kept = with_class_floor(kept, significance, classes, class_floor, fixed=certain)
    selector.activation_rate = count / significance.numel()
    selector.coverage = coverage_of(significance, kept.indices)
    return kept


def _beside_certain(
    selector: SampleSelector, significance: Tensor, certain: Tensor, *, count: int, epoch: int
) -> Selection:
    held = certain.nonzero().squeeze(1)
    if held.numel() == 0 or count == significance.numel():
        return selector.plan(significance, count=count, epoch=epoch)
    if held.numel() >= count:
        return Selection(held[significance[held].topk(count).indices].sort().values)
    others = (~certain).nonzero().squeeze(1)
    drawn = selector.plan(significance[others], count=count - held.numel(), epoch=epoch)
    indices, order = torch.cat([held, others[drawn.indices]]).sort()
    if drawn.weights is None:
        return Selection(indices)
    return Selection(indices, torch.cat([drawn.weights.new_ones(held.numel()), drawn.weights])[order])


def rate_to_cover(significance: Tensor, coverage: float, gate: GateName, *, always: Tensor | None = None) -> float:
    """Return the share of samples ``(n,)`` that a plan needs for a coverage, where ``always`` are in it for certain."""
    rule: GateName = gate if gate == "soft" else "topk"  # a hard cut over a whole data set keeps the largest
    solve = rate_of_many if significance.numel() > MANY else rate_at_coverage
    if always is None or not bool(always.any()):
        return solve(significance, coverage, rule, floor=floor_for(coverage))
    others = significance[~always]
    total = float(significance.double().sum())
    left = float(others.double().sum())
    # What has no significance at all counts as equal, as for the gates.
    wanted = coverage if left <= 0 else (coverage * total - (total - left)) / left
    held = significance.numel() - others.numel()
    rate = solve(others, wanted, rule, floor=floor_for(wanted)) if wanted > 0 and others.numel() else 0.0
    return (held + rate * others.numel()) / significance.numel()


def common_rate(
    significance: Tensor,
    coverage: float,
    gate: GateName,
    *,
    total: Callable[[Tensor], Tensor],
    share: float = 1.0,
    always: Tensor | None = None,
) -> float:
    """Return the least rate at which the parts of a data set carry a coverage together, each pruned at that rate.

    Every process calls it with its own part, and all get the same rate; ``total`` sums a tensor over them. The
    ``share`` is that of this part's samples which are trained on at a rate of 1.
    """
    rule: GateName = gate if gate == "soft" else "topk"
    others = significance if always is None else significance[~always]
    histogram = histogram_of(others)
    held = significance.numel() - others.numel()
    own = float(significance.double().sum())
    certain = own - float(others.double().sum())
    whole = float(total(torch.tensor([own], dtype=torch.float64)))
    if coverage >= 1 or whole <= 0:  # what has no significance at all counts as equal
        return coverage
    low = 0.0
    high = 1.0
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        left = (rate * share * significance.numel() - held) / max(1, others.numel())
        carried = certain
        if left > 0 and others.numel():
            carried += carried_at(histogram, left, rule, floor=floor_for(left))
        if float(total(torch.tensor([carried], dtype=torch.float64))) < coverage * whole:
            low = rate
        else:
            high = rate
    return high


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
        itself (always with ``drop_last``), else the exact rate, but for a last batch that would be very small: one has
        8 samples at least, or an eighth of a batch where that is less.

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
    each += _lacking(each, batch_size, at_least=at_least)
    return min(each * processes, offered)


def _lacking(count: int, batch_size: int, *, at_least: bool) -> int:
    """Count the samples that a last batch lacks; fewer than none where it is rather left out."""
    # BatchNorm cannot train on one sample, and its statistics of a few are far off, right before a validation.
    rest = count % batch_size
    least = max(2, min(_LEAST_BATCH, batch_size // 8))
    if batch_size == 1 or rest == 0 or rest >= least:
        return 0
    if count < batch_size:  # the only batch
        return int(count == 1)
    return least - rest if at_least or 2 * rest > least else -rest


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
