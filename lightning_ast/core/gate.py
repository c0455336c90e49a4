"""Step 5 of a batch: turn significance and a threshold into keep-probabilities, and these into the samples kept.

``soft`` keeps a sample with probability ``clip(significance / threshold, floor, 1)``, ``threshold`` keeps those above
the threshold, ``topk`` the largest. :func:`solve_threshold` is the inverse: the threshold at which a given share of a
batch is kept, of its samples (the activation rate) or of their significance (the coverage).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_ast.core.systematic import on_host, systematic_sample

__all__ = [
    "EXPONENTS",
    "FLOOR",
    "NEARLY_ALL",
    "GateName",
    "Selection",
    "ShareOf",
    "Weighting",
    "coverage_of",
    "floor_for",
    "keep_probability",
    "lift_zeros",
    "minimum_count",
    "rate_at_coverage",
    "select",
    "soft_threshold",
    "solve_threshold",
    "threshold_of_few_counts",
    "trimmed",
]

GateName = Literal["soft", "threshold", "topk"]
Weighting = Literal["none", "sqrt", "unbiased"]
"""The weights ``p**-a`` of a soft gate: the gradient estimates the mean over the selected samples (a = 0), the
full batch's mean without bias (1), or something between the two (1/2)."""
_Array = np.ndarray[Any, Any]
ShareOf = Literal["samples", "significance"]
"""What a target is a share of: an activation rate of the samples, a coverage of their summed significance."""

FLOOR = 0.01
"""Least keep-probability of the soft gate: no sample is lost for good, and no weight exceeds 1 / FLOOR."""

NEARLY_ALL = 0.95
"""Activation rate from which on, with a coverage for a target, selection costs more than it saves."""

_ROUNDING = 1e-12
_FEWEST_COUNTS = 12  # in each octave of counts; smaller batches keep any number
EXPONENTS: dict[Weighting, float] = {"none": 0.0, "sqrt": 0.5, "unbiased": 1.0}


@dataclass(frozen=True)
class Selection:
    """Which samples of a batch are trained on.

    Attributes:
        indices: ``(k,)`` int64 positions in the batch, ascending.
        weights: ``(k,)`` importance weights ``p**-a`` of the selected samples, or None where all are 1.
    """

    indices: Tensor
    weights: Tensor | None = None

    def to(self, device: torch.device) -> Selection:
        """Bring the selection to a device; nothing waits for that."""
        if self.indices.device == device:
            return self
        weights = None if self.weights is None else self.weights.to(device, non_blocking=True)
        return Selection(self.indices.to(device, non_blocking=True), weights)

    def among(self, eligible: Tensor | None) -> Selection:
        """Keep the samples that are ``eligible``, ``(B,)`` bool or None for all; reading them waits for the device."""
        if eligible is None:
            return self
        keep = eligible.to(self.indices.device)[self.indices]
        return Selection(self.indices[keep], None if self.weights is None else self.weights[keep])


def keep_probability(
    significance: Tensor, threshold: Tensor | float, gate: GateName, *, floor: float = FLOOR
) -> Tensor:
    """Compute the probability of each sample to be kept, ``(B,)`` in [0, 1].

    Args:
        significance: ``(B,)``, non-negative.
        threshold: The significance at which the gate is fully open.
        gate: ``"soft"``: ``clip(significance / threshold, floor, 1)``; ``"threshold"`` and ``"topk"``: 1 above (for
            ``topk`` also at) the threshold, else 0.
        floor: The least probability of the soft gate, in [0, 1].

    Example:
        >>> keep_probability(torch.tensor([0.0, 1.0, 3.0]), 2.0, "soft")
        tensor([0.0100, 0.5000, 1.0000])
    """
    if gate == "soft":
        threshold = torch.as_tensor(threshold, dtype=significance.dtype, device=significance.device)
        return (significance / threshold.clamp_min(torch.finfo(significance.dtype).tiny)).clamp(floor, 1.0)
    kept = significance >= threshold if gate == "topk" else significance > threshold
    return kept.to(significance.dtype)


def floor_for(target: float) -> float:
    """Return the least probability of the soft gate for a target rate or coverage: :data:`FLOOR`, or less."""
    return min(FLOOR, 0.1 * target)


def lift_zeros(significance: Tensor) -> Tensor:
    """Raise a significance ``(B,)`` below a millionth of the largest to that."""
    # Samples learned perfectly stay eligible: else no threshold could keep more than have a significance above 0.
    return significance.clamp_min(significance.max() * 1e-6 + 1e-30)


def trimmed(significance: Tensor, share: float) -> Tensor:
    """Set the largest of some significance ``(B,)`` to 0, as many as the share in [0, 1): they count as wrong labels.

    Source: Shen and Sanghavi, Learning with Bad Training Data via Iterative Trimmed Loss Minimization, ICML 2019.
    """
    # A sample with a wrong label keeps a large gradient for as long as the network does not memorise it, and rules that
    # prefer hard samples choose it again and again.
    count = round(share * significance.numel())
    return significance if count == 0 else significance.index_fill(0, significance.topk(count).indices, 0.0)


def solve_threshold(
    significance: Tensor, target: float, gate: GateName, *, floor: float = FLOOR, share_of: ShareOf = "samples"
) -> Tensor:
    """Find the threshold at which the expected share of this batch that is kept is ``target``.

    Args:
        significance: ``(B,)``, non-negative.
        target: The share, in (0, 1); for the soft gate above ``floor``.
        gate: The gate that the threshold is for. The hard ones keep the fewest samples that carry the share, and the
            threshold lies between the last of them and the next.
        floor: The least probability of the soft gate.
        share_of: Whether the target is a share of the samples (an activation rate), or of the summed significance (a
            coverage), which counts as equal where it is 0 throughout.

    Returns:
        A positive scalar tensor on the device of ``significance``.

    Example:
        >>> s = torch.tensor([0.1, 0.2, 0.4, 0.8])
        >>> float(keep_probability(s, solve_threshold(s, 0.5, "soft"), "soft").mean())
        0.5
    """
    raw = on_host(significance)
    s = np.maximum(raw, raw.max() * 1e-6 + 1e-30)  # as lift_zeros does
    values: _Array | None = None
    scale = 1.0
    if share_of == "significance":
        values = _shares(raw)
        scale = s.max()
        s = s / scale
    if gate == "soft":
        threshold = scale * soft_threshold(s, values, target, floor)
    else:
        ordered = np.append(np.sort(s)[::-1], 0.0)  # the 0 stands below the last sample, where all are kept
        kept = _hard_count(raw, target, share_of)
        if share_of == "significance" and gate == "threshold":  # equal ones are all above the threshold, or none is
            kept = int((ordered >= ordered[kept - 1]).sum())
        threshold = scale * math.sqrt(ordered[kept - 1] * max(ordered[kept], 1e-30))
    wide = torch.float32 if significance.device.type == "mps" else torch.float64  # Apple's GPUs have no other
    return torch.tensor(threshold, dtype=wide, device=significance.device)


def soft_threshold(s: _Array, values: _Array | None, target: float, floor: float) -> float:
    """Find where the soft gate is expected to keep a share of the summed ``values`` (None: equal) of some scores."""
    # With x = 1 / threshold, a sample's probability is floor up to x = floor / s, then s * x, and 1 from x = 1 / s on.
    # So the sum is piecewise linear in x: its slope grows by v * s at the first of these points, and falls by it later.
    total = len(s) if values is None else values.sum()
    weighted = s if values is None else values * s
    points = np.concatenate([floor / s, 1 / s])
    order = points.argsort()
    points.sort()
    slopes = np.concatenate([weighted, -weighted])[order].cumsum()
    sums = np.zeros(len(points))
    (slopes[:-1] * (points[1:] - points[:-1])).cumsum(out=sums[1:])
    sums += floor * total
    after = min(max(int(sums.searchsorted(target * total)), 1), 2 * len(s) - 1)
    slope = max(slopes[after - 1], 1e-30)
    return float(1 / (points[after - 1] + (target * total - sums[after - 1]) / slope))


def _hard_count(raw: _Array, target: float, share_of: ShareOf) -> int:
    size = len(raw)
    if share_of == "samples":
        return min(size, max(1, round(target * size)))
    carried = np.sort(_shares(raw))[::-1].cumsum()
    return min(size, int(carried.searchsorted(target * (1 - _ROUNDING))) + 1)


def _shares(raw: _Array) -> _Array:
    """Return the share of the summed significance that each sample carries; equal ones where there is none."""
    total = raw.sum()
    return raw / total if total > 0 else np.full_like(raw, 1 / len(raw))


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
    if coverage >= 1:
        return 1.0
    significance = significance.detach().cpu().double()
    if gate == "topk":
        return _hard_count(significance.numpy(), coverage, "significance") / significance.numel()
    threshold = solve_threshold(significance, coverage, gate, floor=floor, share_of="significance")
    return float(keep_probability(lift_zeros(significance), threshold, gate, floor=floor).mean())


def coverage_of(significance: Tensor, indices: Tensor) -> float:
    """Return the share of the summed significance ``(n,)`` that the samples at some positions carry, in [0, 1]."""
    total = float(significance.sum(dtype=torch.float64))
    if total <= 0:  # all samples carry the same
        return indices.numel() / significance.numel()
    return min(1.0, float(significance.index_select(0, indices).sum(dtype=torch.float64)) / total)


def threshold_of_few_counts(
    significance: Tensor, threshold: Tensor | float, generator: torch.Generator, *, floor: float = FLOOR
) -> Tensor:
    """Move a threshold of the soft gate so that a batch keeps one of few numbers of samples, 4 to 8 % apart.

    The expected count is rounded down or up at random, so that its mean stays the same.

    Args:
        significance: ``(B,)``, positive.
        threshold: The threshold to move.
        generator: The CPU generator of the draw.
        floor: The least probability of the gate.

    Example:
        >>> s = torch.linspace(0.1, 1, 100)
        >>> moved = threshold_of_few_counts(s, 1.0, torch.Generator().manual_seed(0))
        >>> round(float(keep_probability(s, 1.0, "soft").sum()), 2)
        55.0
        >>> round(float(keep_probability(s, moved, "soft").sum()), 2)
        56.0
    """
    size = significance.numel()  # a GPU prepares its kernels anew for each, which may cost more than the step
    expected = float(keep_probability(significance, threshold, "soft", floor=floor).double().sum())
    apart = 2 ** math.floor(math.log2(max(1.0, expected / _FEWEST_COUNTS)))
    if apart == 1 or expected > size - apart:
        return torch.as_tensor(threshold)
    count = apart * math.floor(expected / apart + float(torch.rand(1, generator=generator, dtype=torch.float64)))
    return solve_threshold(significance, count / size, "soft", floor=floor)


def minimum_count(batch_size: int, min_selected: int | float) -> int:
    """Return the fewest samples that are kept of a batch: a number, or a share in (0, 1) that is at least 2 samples.

    A share of 0.1 is the original package's floor.
    """
    # Two, because BatchNorm cannot train on one.
    wanted = max(2, math.floor(batch_size * min_selected)) if isinstance(min_selected, float) else min_selected
    return min(batch_size, wanted)


def select(
    significance: Tensor,
    threshold: Tensor | float,
    *,
    gate: GateName,
    rate: float,
    weighting: Weighting,
    min_selected: int | float,
    generator: torch.Generator,
    floor: float = FLOOR,
    eligible: Tensor | None = None,
    few_counts: bool = False,
) -> Selection:
    """Choose the samples of a batch to train on: none only where none is eligible.

    Args:
        significance: ``(B,)``, non-negative.
        threshold: The significance at which the gate is fully open; ``topk`` does not read it.
        gate: ``"soft"``, ``"threshold"`` (the original's hard cut; it starves a batch of easy samples and needs a
            controller that already holds its rate) or ``"topk"`` (exactly ``round(rate * B)``).
        rate: The target activation rate in (0, 1], for ``topk``.
        weighting: ``p**-a`` with a = 0, 1/2, 1. The hard gates have p = 1 for what they keep: always weight 1.
        min_selected: The fewest samples, as an int, or as a share of the batch in (0, 1), but at least 2. Where the
            gate keeps fewer, the most significant of the others are added.
        generator: The CPU generator of the soft gate's draw; the global one is not touched.
        floor: The least probability of the soft gate.
        eligible: ``(B,)`` bool, the samples that may be chosen at all, the others having the least significance; None
            for all.
        few_counts: Whether the soft gate keeps one of few numbers of samples.
    """
    size = significance.numel()
    least = minimum_count(size, min_selected)
    if gate == "topk":  # by rank, not by the threshold: equal significances would make the count jump
        indices = significance.topk(max(least, round(rate * size))).indices.sort().values
        return Selection(indices).among(eligible)
    if gate == "soft" and few_counts:
        threshold = threshold_of_few_counts(significance, threshold, generator, floor=floor)
    probability = keep_probability(significance, threshold, gate, floor=floor)
    if eligible is not None:
        probability = probability.where(eligible, torch.zeros_like(probability))
    soft = gate == "soft"
    indices = systematic_sample(probability, generator) if soft else probability.nonzero().squeeze(1)
    if indices.numel() < least:
        # Those that are selected already come first, for they are raised above the largest of the others.
        boosted = significance / significance.max().clamp_min(torch.finfo(significance.dtype).tiny)
        if eligible is not None:
            boosted = boosted.where(eligible, -torch.ones_like(boosted))
        boosted = boosted.index_add(0, indices, torch.full_like(boosted[indices], 2.0))
        indices = boosted.topk(least).indices.sort().values
    exponent = EXPONENTS[weighting]
    if gate != "soft" or exponent == 0:
        return Selection(indices).among(eligible)
    return Selection(indices, probability.index_select(0, indices).pow(-exponent)).among(eligible)
