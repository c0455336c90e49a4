"""Step 5 of a batch: turn significance and a threshold into keep-probabilities, and these into the samples kept.

``soft`` keeps a sample with probability ``clip(significance / threshold, floor, 1)``, ``threshold`` keeps those above
the threshold, ``topk`` the largest. The threshold is found in :mod:`lightning_ast.core.threshold`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "EXPONENTS",
    "FLOOR",
    "NEARLY_ALL",
    "GateName",
    "Selection",
    "Weighting",
    "carried_by",
    "coverage_of",
    "drawn",
    "floor_for",
    "generator_of",
    "keep_probability",
    "lift_zeros",
    "lifted",
    "minimum_count",
    "select",
    "soft_probability",
    "trimmed",
    "with_class_floor",
]

GateName = Literal["soft", "threshold", "topk"]
Weighting = Literal["none", "sqrt", "unbiased"]
"""The weights ``p**-a`` of a soft gate: the gradient estimates the mean over the selected samples (a = 0), the
full batch's mean without bias (1), or something between the two (1/2)."""
_Array = np.ndarray[Any, Any]

FLOOR = 0.01
"""Least keep-probability of the soft gate: no sample is lost for good, and no weight exceeds 1 / FLOOR."""

NEARLY_ALL = 0.95
"""Activation rate from which on, with a coverage for a target, selection costs more than it saves."""

_ROUNDING = 1e-9

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


def soft_probability(scores: _Array, threshold: float, floor: float) -> _Array:
    """Compute what :func:`keep_probability` does for the soft gate, on the host, where torch's calls cost more."""
    limits = np.finfo(scores.dtype)
    top = scores.dtype.type(max(threshold, float(limits.tiny)) if threshold <= float(limits.max) else math.inf)
    kept: _Array = np.maximum(np.minimum(scores, top) / top, floor)  # no quotient of two far ends can overflow
    return kept


def lifted(scores: _Array) -> _Array:
    """Raise scores ``(n,)`` below a millionth of the largest to that."""
    # Samples learned perfectly stay eligible: else no threshold could keep more than have a significance above 0.
    exact = scores.dtype.type
    raised: _Array = np.maximum(scores, scores.max() * exact(1e-6) + exact(1e-30))
    return raised


def lift_zeros(significance: Tensor) -> Tensor:
    """Raise a significance ``(B,)``, on the CPU, below a millionth of the largest to that."""
    return torch.from_numpy(lifted(significance.numpy()))


def trimmed(significance: Tensor, share: float) -> Tensor:
    """Set the largest of some significance ``(B,)`` to 0, as many as the share in [0, 1): they count as wrong labels.

    Source: Shen and Sanghavi, Learning with Bad Training Data via Iterative Trimmed Loss Minimization, ICML 2019.
    """
    # A sample with a wrong label keeps a large gradient for as long as the network does not memorise it, and rules that
    # prefer hard samples choose it again and again.
    count = round(share * significance.numel())
    return significance if count == 0 else significance.index_fill(0, significance.topk(count).indices, 0.0)


def carried_by(significance: Tensor, indices: Tensor) -> tuple[float, float]:
    """Return the summed significance of the samples at some positions, and that of all ``(n,)``, on the CPU."""
    values = significance.numpy()
    return float(values[indices.numpy()].sum(dtype=np.float64)), float(values.sum(dtype=np.float64))


def coverage_of(significance: Tensor, indices: Tensor) -> float:
    """Return the share of the summed significance ``(n,)`` that the samples at some positions carry, in [0, 1]."""
    carried, total = carried_by(significance, indices)
    # Without any significance, all samples carry the same.
    return min(1.0, carried / total) if total > 0 else indices.numel() / significance.numel()


def minimum_count(batch_size: int, min_selected: int | float) -> int:
    """Return the fewest samples that are kept of a batch: a number, or a share in (0, 1) that is at least 2 samples.

    A share of 0.1 is the original package's floor.
    """
    # Two, because BatchNorm cannot train on one.
    wanted = max(2, math.floor(batch_size * min_selected)) if isinstance(min_selected, float) else min_selected
    return min(batch_size, wanted)


def drawn(probability: _Array, generator: torch.Generator) -> _Array:
    """Draw samples with the inclusion probabilities ``(n,)``, at ascending positions ``(k,)``.

    Each sample is kept with exactly its probability; the count differs from the sum of the probabilities by less than
    1, where independent draws would scatter by its square root.
    Source: W. G. Madow, On the theory of systematic sampling, II, Ann. Math. Statist. 20 (1949) 333-354.
    """
    # The samples are laid end to end in random order, each as long as its probability; a comb of unit spacing with a
    # random offset picks those it hits. Drawn on the CPU, they are the same for every device.
    noise = torch.rand(len(probability) + 1, generator=generator, dtype=torch.float64).numpy()
    order = noise[:-1].argsort()
    ends = np.zeros(len(noise))
    np.floor(probability[order].cumsum(dtype=np.float64) + noise[-1], out=ends[1:])
    kept: _Array = order[ends[1:] > ends[:-1]]
    kept.sort()
    return kept


def generator_of(seed: int, rank: int, step: int) -> torch.Generator:
    """Make the generator of one step alone: there is nothing to save, and every process draws its own."""
    # A hash makes one seed of three numbers, and keeps neighbouring steps from drawing alike.
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # to fit into 63 bits


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
    """
    size = significance.numel()
    least = minimum_count(size, min_selected)
    if gate == "topk":  # by rank, not by the threshold: equal significances would make the count jump
        indices = significance.topk(max(least, round(rate * size))).indices.sort().values
        return Selection(indices).among(eligible)
    probability = None
    if gate == "soft":
        values = significance.detach().cpu().numpy()
        probability = soft_probability(values, float(threshold), floor)
        if eligible is not None:
            probability[~eligible.cpu().numpy()] = 0
        indices = torch.from_numpy(drawn(probability, generator)).to(significance.device)
    else:
        kept = keep_probability(significance, threshold, gate)
        indices = (kept if eligible is None else kept * eligible).nonzero().squeeze(1)
    if indices.numel() < least:
        # Those that are selected already come first, for they are raised above the largest of the others.
        boosted = significance / significance.max().clamp_min(torch.finfo(significance.dtype).tiny)
        if eligible is not None:
            boosted = boosted.where(eligible, -torch.ones_like(boosted))
        boosted = boosted.index_add(0, indices, torch.full_like(boosted[indices], 2.0))
        indices = boosted.topk(least).indices.sort().values
    exponent = EXPONENTS[weighting]
    if probability is None or exponent == 0:
        return Selection(indices).among(eligible)
    weights = torch.from_numpy(probability[indices.cpu().numpy()]).pow(-exponent)
    return Selection(indices, weights.to(significance.device)).among(eligible)


def with_class_floor(
    selection: Selection,
    significance: Tensor,
    classes: Tensor,
    floor: float,
    *,
    eligible: Tensor | None = None,
    fixed: Tensor | None = None,
) -> Selection:
    """Add the most significant samples of each class of which less than the share ``floor`` was selected.

    All ``(n,)`` tensors are on the CPU. A negative class is not known and has no floor. Only ``eligible`` samples are
    added. With ``fixed``, the selected samples that must stay, as many of the others are left out as are added: the
    least significant ones that their classes can spare.
    """
    kept = torch.zeros(significance.numel(), dtype=torch.bool).index_fill_(0, selection.indices, True)
    known = classes >= 0
    kinds = int(classes.max()) + 1 if classes.numel() else 0
    if kinds <= 0:
        return selection
    sizes = classes[known].bincount(minlength=kinds)
    held = classes[known & kept].bincount(minlength=kinds)
    needed = (floor * sizes.double() - _ROUNDING).ceil().long().clamp_min(0)
    open_to_choice = ~kept & known if eligible is None else ~kept & known & eligible
    added = _best_of_each(open_to_choice, significance, classes, (needed - held).clamp_min(0))
    if added.numel() == 0:
        return selection
    if fixed is not None:
        spare = _best_of_each(kept & known & ~fixed, -significance, classes, (held - needed).clamp_min(0))
        spare = torch.cat([spare, (kept & ~known & ~fixed).nonzero().squeeze(1)])
        added = added[significance[added].argsort(descending=True)][: spare.numel()]
        kept[spare[significance[spare].argsort()][: added.numel()]] = False
    selection = selection.among(kept)
    indices, order = torch.cat([selection.indices, added]).sort()
    if selection.weights is None:
        return Selection(indices)
    # What is added is kept for certain, and so has weight 1.
    return Selection(indices, torch.cat([selection.weights, selection.weights.new_ones(added.numel())])[order])


def _best_of_each(among: Tensor, values: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Return the positions of the largest values of each class, so many as ``counts`` has for it."""
    positions = among.nonzero().squeeze(1)
    positions = positions[values[positions].argsort(descending=True, stable=True)]
    own, order = classes[positions].sort(stable=True)
    first = torch.searchsorted(own, torch.arange(counts.numel(), dtype=own.dtype))
    rank = torch.arange(own.numel()) - first[own.long()]
    return positions[order[rank < counts[own.long()]]]
