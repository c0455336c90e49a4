"""Step 5, the inverse of the gate: the threshold at which a share of a batch is kept.

It is a share of the samples (the activation rate) or of their summed significance (the coverage).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_ast.core.gate import FLOOR, GateName, keep_probability, lifted, soft_probability

__all__ = ["Average", "ShareOf", "SoftSums", "ThresholdSolver", "rate_at_coverage", "solve_threshold"]

_Array = np.ndarray[Any, Any]
ShareOf = Literal["samples", "significance"]
"""What a target is a share of: an activation rate of the samples, a coverage of their summed significance."""

Average = Callable[[Tensor], Tensor]
"""Averages a tensor over the processes that train together."""

_GRID = torch.linspace(-8.0, 8.0, 97, dtype=torch.float64)
"""Logarithms of the thresholds, around a first guess, at which the coverage of all batches together is computed."""
_ROUNDING = 1e-12
_FEWEST_COUNTS = 12  # in each octave of counts; smaller batches keep any number


class SoftSums:
    """What the soft gate is expected to keep at each threshold: sorted once for all shares that are asked for.

    ``scores``, ``(n,)``, are positive; ``values``, ``(n,)``, are what keeping each counts, None where all count alike.
    """

    def __init__(self, scores: _Array, values: _Array | None, floor: float) -> None:
        # With x = 1 / threshold, a sample's probability is floor up to x = floor / s, then s * x, and 1 from x = 1 / s
        # on. So the sum is piecewise linear in x: its slope grows by v * s at the first of these points, and falls by
        # it later.
        self._total = len(scores) if values is None else values.sum()
        weighted = scores if values is None else values * scores
        points = np.concatenate([floor / scores, 1 / scores])
        order = points.argsort()
        self._points = points[order]
        self._slopes = np.concatenate([weighted, -weighted])[order].cumsum()
        self._sums = np.zeros(len(points))
        (self._slopes[:-1] * (self._points[1:] - self._points[:-1])).cumsum(out=self._sums[1:])
        self._sums += floor * self._total

    def threshold(self, target: float) -> float:
        """Return the threshold at which a share of the summed values is expected to be kept."""
        wanted = target * self._total
        after = min(max(int(self._sums.searchsorted(wanted)), 1), len(self._sums) - 1)
        slope = max(self._slopes[after - 1], 1e-30)
        return float(1 / (self._points[after - 1] + (wanted - self._sums[after - 1]) / slope))


class ThresholdSolver:
    """Solves the thresholds of one batch ``(B,)``, for one gate.

    The hard gates keep the fewest samples that carry a share, and their threshold lies between the last of them and the
    next. A significance that is 0 throughout counts as equal. The ``floor`` is the soft gate's least probability.
    """

    def __init__(self, significance: Tensor, gate: GateName, *, floor: float, share_of: ShareOf) -> None:
        self.significance = significance
        self.floor = floor
        self._gate: GateName = gate
        self._of_samples = share_of == "samples"
        # On the host many small operations take a tenth of a device's time.
        self._raw = significance.detach().cpu().double().numpy()
        self._scores = lifted(self._raw)
        self._scale = 1.0 if self._of_samples else self._scores.max()
        self._sums: SoftSums | None = None

    def threshold(self, target: float) -> float:
        """Return the threshold at which the expected share that is kept is a target in (0, 1), above the floor."""
        if self._gate != "soft":
            return self._hard(target)
        if self._sums is None:
            values = None if self._of_samples else _shares(self._raw)
            self._sums = SoftSums(self._scores / self._scale, values, self.floor)
        return float(self._scale * self._sums.threshold(target))

    def rate(self, target: float) -> float:
        """Return the share of the samples, in (0, 1], that is expected to be kept at :meth:`threshold`."""
        if target >= 1:
            return 1.0
        if self._gate == "topk":
            return self._count(target) / len(self._raw)
        scores = torch.from_numpy(self._scores)
        return float(keep_probability(scores, self.threshold(target), self._gate, floor=self.floor).mean())

    def with_few_counts(self, threshold: float, generator: torch.Generator) -> float:
        """Move a threshold of the soft gate so that a batch keeps one of few numbers of samples, 4 to 8 % apart.

        The expected count is rounded down or up at random, so that its mean stays the same. The scores are on the CPU,
        and the targets shares of the samples.
        """
        scores = self.significance.numpy()
        size = len(scores)  # a GPU prepares its kernels anew for each, which may cost more than the step
        expected = float(soft_probability(scores, threshold, self.floor).sum(dtype=np.float64))
        apart = 2 ** math.floor(math.log2(max(1.0, expected / _FEWEST_COUNTS)))
        if apart == 1 or expected > size - apart:
            return threshold
        count = apart * math.floor(expected / apart + float(torch.rand(1, generator=generator, dtype=torch.float64)))
        return self.threshold(count / size)

    def shared(
        self, coverage: float, own: float | None, expected: float, average: Average
    ) -> tuple[Tensor | None, float]:
        """Return the threshold at which the batches of all processes together have a coverage: as of one large batch.

        ``own`` is that of this batch, None where none is wanted. The rate that is ``expected`` of it is averaged, too.
        """
        significance = torch.from_numpy(self._raw)
        total = float(significance.sum())
        # The summed significance of a batch weighs its threshold, as it would in one large batch.
        log = 0.0 if own is None else float(torch.tensor(own, dtype=torch.float64).log())
        mean = average(torch.tensor([log, expected, log * total, total], dtype=torch.float64))
        if own is None:
            return None, float(mean[1])
        guess = (mean[2] / mean[3] if mean[3] > 0 else mean[0]).exp()
        # The scores themselves are not exchanged: each process sums what its gate would keep at many thresholds around
        # a guess, which is the same everywhere, and the threshold is found between two of the averaged sums.
        thresholds = float(guess) * _GRID.exp()
        keep = keep_probability(torch.from_numpy(self._scores), thresholds[:, None], self._gate, floor=self.floor)
        *sums, offered = average(torch.cat([(keep * significance).sum(1), significance.sum().reshape(1)])).tolist()
        if offered <= 0:
            return guess, float(mean[1])
        # From the largest threshold to the least; the sum of the soft gate is piecewise linear in 1 / threshold.
        inverse = np.interp(coverage * offered, sums[::-1], (1 / thresholds).flip(0).numpy())
        return torch.tensor(1 / inverse, dtype=torch.float64), float(mean[1])

    def _hard(self, target: float) -> float:
        scores = self._scores / self._scale
        ordered = np.append(np.sort(scores)[::-1], 0.0)  # the 0 stands below the last sample, where all are kept
        kept = self._count(target)
        if self._gate == "threshold" and not self._of_samples:  # equal ones are all above the threshold, or none is
            kept = int((ordered >= ordered[kept - 1]).sum())
        return float(self._scale * math.sqrt(ordered[kept - 1] * max(ordered[kept], 1e-30)))

    def _count(self, target: float) -> int:
        """Count the fewest samples that carry a share."""
        size = len(self._raw)
        if self._of_samples:
            return min(size, max(1, round(target * size)))
        carried = np.sort(_shares(self._raw))[::-1].cumsum()
        return min(size, int(carried.searchsorted(target * (1 - _ROUNDING))) + 1)


def _shares(raw: _Array) -> _Array:
    """Return the share of the summed significance that each sample carries; equal ones where there is none."""
    total = raw.sum()
    return raw / total if total > 0 else np.full_like(raw, 1 / len(raw))


def solve_threshold(
    significance: Tensor, target: float, gate: GateName, *, floor: float = FLOOR, share_of: ShareOf = "samples"
) -> Tensor:
    """Find the threshold at which the expected share of this batch that is kept is ``target``.

    The other arguments are those of :class:`ThresholdSolver`.

    Returns:
        A positive scalar tensor on the device of ``significance``.

    Example:
        >>> s = torch.tensor([0.1, 0.2, 0.4, 0.8])
        >>> float(keep_probability(s, solve_threshold(s, 0.5, "soft"), "soft").mean())
        0.5
    """
    threshold = ThresholdSolver(significance, gate, floor=floor, share_of=share_of).threshold(target)
    wide = torch.float32 if significance.device.type == "mps" else torch.float64  # Apple's GPUs have no other
    return torch.tensor(threshold, dtype=wide, device=significance.device)


def rate_at_coverage(significance: Tensor, coverage: float, gate: GateName, *, floor: float = FLOOR) -> float:
    """Compute the expected share of the samples, in (0, 1], that carries a share of the significance by a gate.

    Args:
        significance: ``(n,)``, non-negative and finite.
        coverage: The share of the summed significance, in (0, 1]; for the soft gate above ``floor``.
        gate: The gate. The hard ones keep the fewest samples that carry the share.
        floor: The least probability of the soft gate.

    Example:
        >>> s = torch.tensor([5.0, 2.0, 2.0, 1.0])
        >>> rate_at_coverage(s, 0.7, "topk"), rate_at_coverage(torch.ones(4), 0.7, "soft")
        (0.5, 0.7)
    """
    return ThresholdSolver(significance, gate, floor=floor, share_of="significance").rate(coverage)
