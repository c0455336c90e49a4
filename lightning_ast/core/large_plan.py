"""Step 5 for data sets too large to sort: the gate solved from a histogram, the draw made block by block.

A histogram holds the number and the sum of the scores in 65,536 classes, each 0.4 % wide or less. Those of several
parts of a data set add up to that of the whole, so it is all that processes would have to exchange: 1 MiB, whatever the
size. A hard cut is exact; the probabilities of a soft gate are within 0.4 % of those of :mod:`lightning_ast.core.gate`,
and the count is kept to the sample by either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ast.core.gate import EXPONENTS, GateName, Selection, Weighting
from lightning_ast.core.threshold import SoftSums

__all__ = [
    "MANY",
    "carried_at",
    "each_once",
    "histogram_of",
    "largest",
    "planned",
    "rate_of_many",
    "sampled",
    "threshold_of",
]

MANY = 2**22
"""Number of samples above which plans are made here: sorting takes 2 microseconds and 140 bytes a sample."""
_BLOCK = 2**20
_LEAST = 1e-6  # share of the largest score to which others are lifted, as lift_zeros does
_SHIFT = 15  # bits of a float32 that are left out: sign, exponent and 8 bits of the mantissa make the class
_CLASSES = 2**16
_Array = np.ndarray[Any, Any]


def _least(scores: Tensor) -> float:
    """Return what scores below are lifted to: samples learned stay eligible."""
    return float(np.float32(float(scores.max()) * _LEAST + 1e-30))


def _blocks(scores: Tensor) -> Iterator[_Array]:
    """Yield consecutive parts of float32 scores ``(n,)``, lifted."""
    least = _least(scores)
    for part in torch.split(scores, _BLOCK):
        yield np.maximum(part.numpy(), least)


def histogram_of(scores: Tensor) -> _Array:
    """Count and sum scores ``(n,)``, float32 and non-negative, by class: ``(2, 65536)`` float64."""
    found = np.zeros((2, _CLASSES))
    for part in (part.numpy() for part in torch.split(scores, _BLOCK)):
        classes = part.view(np.int32) >> _SHIFT
        found[0] += np.bincount(classes, minlength=_CLASSES)
        found[1] += np.bincount(classes, weights=part, minlength=_CLASSES)
    return found


def _filled(histogram: _Array) -> tuple[_Array, _Array, _Array]:
    """Return count, sum and mean of the classes that hold scores, in ascending order; the mean of zeros is lifted."""
    counts, sums = histogram[:, histogram[0] > 0]
    means = sums / counts
    return counts, sums, np.maximum(means, means[-1] * _LEAST + 1e-30)


def threshold_of(histogram: _Array, rate: float, *, floor: float) -> float:
    """Find the threshold at which the soft gate keeps an expected share of the samples in a histogram."""
    counts, _, means = _filled(histogram)
    return SoftSums(means, counts, floor).threshold(rate)


def rate_of_many(scores: Tensor, coverage: float, gate: GateName, *, floor: float) -> float:
    """Compute the share of many samples that a gate keeps where they carry a share of the significance.

    It is that of :func:`~lightning_ast.core.threshold.rate_at_coverage`, within 0.4 % of itself.
    """
    if coverage >= 1:
        return 1.0
    counts, sums, means = _filled(histogram_of(scores))
    if gate == "soft":
        threshold = SoftSums(means / means[-1], sums / sums.sum(), floor).threshold(coverage) * means[-1]
        return float((counts * (means / threshold).clip(floor, 1)).sum() / counts.sum())
    carried = sums[::-1].cumsum() / sums.sum()
    last = int(carried.searchsorted(coverage))
    before = carried[last] - sums[::-1][last] / sums.sum()
    inside = (coverage - before) * sums.sum() / means[::-1][last]  # samples of the class in which the share is met
    return float((counts[::-1][:last].sum() + inside) / counts.sum())


def carried_at(histogram: _Array, rate: float, gate: GateName, *, floor: float) -> float:
    """Sum the scores in a histogram that a gate keeps at a rate; the hard gates keep the largest."""
    counts, sums, means = _filled(histogram)
    if rate >= 1:
        return float(sums.sum())
    if gate == "soft":
        threshold = SoftSums(means, counts, floor).threshold(rate)
        return float((sums * (means / threshold).clip(floor, 1)).sum())
    larger = counts[::-1].cumsum()[::-1] - counts  # samples in the classes above each
    kept = (rate * counts.sum() - larger).clip(0, counts)
    return float((sums * kept / counts).sum())


def planned(
    scores: Tensor, count: int, gate: GateName, floor: float, weighting: Weighting, generator: torch.Generator
) -> tuple[Selection, Tensor, float]:
    """Choose ``count`` of many samples; return them, the threshold, and the coverage.

    Arguments are those of :func:`sampled`; the gate is ``"soft"`` or ``"topk"``.
    """
    histogram = histogram_of(scores)
    if gate == "soft":
        guess = threshold_of(histogram, count / len(scores), floor=floor)
        exponent = EXPONENTS[weighting]
        kept, threshold = sampled(scores, count, guess, floor=floor, exponent=exponent, generator=generator)
    else:
        positions, threshold = largest(scores, count)
        kept = Selection(positions)
    total = float(histogram[1].sum())
    carried = float(scores[kept.indices].sum(dtype=torch.float64))
    coverage = min(1.0, carried / total) if total > 0 else count / len(scores)
    return kept, torch.tensor(threshold, dtype=torch.float64), coverage


def largest(scores: Tensor, count: int) -> tuple[Tensor, float]:
    """Return the ascending positions of the ``count`` largest of many scores, and the least of these.

    Of equal scores at the cut those are taken that spread evenly over the data set.
    """
    cut = max(np.partition(scores.numpy(), -count)[-count], _least(scores))
    needed = count - sum(int((part > cut).sum()) for part in _blocks(scores))
    equals = sum(int((part == cut).sum()) for part in _blocks(scores))
    found = []
    met = 0
    for number, part in enumerate(_blocks(scores)):
        keep = part > cut
        ties = (part == cut).nonzero()[0]
        turns = (met + np.arange(len(ties) + 1)) * needed // equals  # the k-th is taken where this steps up
        keep[ties[turns[1:] > turns[:-1]]] = True
        met += len(ties)
        found.append(torch.from_numpy(keep.nonzero()[0] + number * _BLOCK))
    return torch.cat(found), float(cut)


def sampled(
    scores: Tensor, count: int, threshold: float, *, floor: float, exponent: float, generator: torch.Generator
) -> tuple[Selection, float]:
    """Draw exactly ``count`` of many samples, each with its probability by the soft gate, block by block.

    About so many are expected at the threshold. The weights are ``p**-exponent``; 0 gives none. Return the selection,
    at ascending positions, and the threshold that was used: at it no fewer are expected.
    """
    expected = _expected(scores, threshold, floor)
    while expected < count:  # a comb wider than 1 cannot hit a sample twice
        threshold *= min((expected / count) ** 2, 1 - 1e-9)
        expected = _expected(scores, threshold, floor)
    comb = expected / count
    end = float(torch.rand((), generator=generator, dtype=torch.float64))
    stop = end + count
    found = []
    weights = []
    start = 0
    for part in _blocks(scores):
        probability = (part.astype(np.float64) / threshold).clip(floor, 1)
        # In random order within a block, so that neighbours in the data set are not drawn in turn.
        order = torch.randperm(len(part), generator=generator).numpy()
        ends = end + np.append(0.0, (probability[order] / comb).cumsum())
        start += len(part)
        if start == len(scores):
            ends[-1] = stop  # but for rounding it is
        ticks = np.floor(ends)
        kept = np.sort(order[ticks[1:] > ticks[:-1]])
        found.append(torch.from_numpy(kept + start - len(part)))
        weights.append(torch.from_numpy(probability[kept] ** -exponent) if exponent else torch.empty(0))
        end = float(ends[-1])
    return Selection(torch.cat(found), torch.cat(weights) if exponent else None), threshold


def _expected(scores: Tensor, threshold: float, floor: float) -> float:
    return sum(float((part.astype(np.float64) / threshold).clip(floor, 1).sum()) for part in _blocks(scores))


def each_once(draws: Tensor, size: int) -> Tensor | None:
    """Return the position of each of ``size`` samples among the draws; None where not each was drawn once."""
    # It is what a stable sort gives, in a fraction of its time and memory.
    if draws.numel() != size:
        return None
    dtype = torch.int32 if size < 2**31 else torch.int64
    positions = torch.full((size,), -1, dtype=dtype)
    start = 0
    for part in torch.split(draws, _BLOCK):
        positions[part] = torch.arange(start, start + len(part), dtype=dtype)
        start += len(part)
    return positions if int(positions.min()) >= 0 else None
