"""Step 5 in several processes: the one threshold at which their batches together have a coverage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_ast.core.gate import GateName, keep_probability, lift_zeros

__all__ = ["Average", "averaged", "joint_threshold"]

Average = Callable[[Tensor], Tensor]
"""Averages a tensor over the processes that train together."""

_GRID = torch.linspace(-8.0, 8.0, 97, dtype=torch.float64)
"""Logarithms of the thresholds, around a first guess, at which the coverage of all batches together is computed."""


def averaged(average: Average, threshold: Tensor | None, expected: float, total: float) -> tuple[Tensor | None, float]:
    """Average the thresholds that the batches of the processes would need, and the rates that are expected of them."""
    # The summed significance of a batch weighs its threshold, as it would in one large batch.
    own = 0.0 if threshold is None else float(threshold.log())  # the controller works in logarithms
    mean = average(torch.tensor([own, expected, own * total, total], dtype=torch.float64))
    shared = mean[2] / mean[3] if mean[3] > 0 else mean[0]
    return (None if threshold is None else shared.exp()), float(mean[1])


def joint_threshold(
    significance: Tensor, coverage: float, gate: GateName, *, floor: float, guess: Tensor, average: Average
) -> Tensor:
    """Find the threshold at which the batches of all processes together have a coverage: as of one large batch."""
    # The scores themselves are not exchanged: each process sums what its gate would keep at many thresholds around a
    # guess, which is the same everywhere, and the threshold is found between two of the averaged sums.
    significance = significance.double()
    lifted = lift_zeros(significance)
    thresholds = float(guess) * _GRID.exp()
    kept = (keep_probability(lifted, thresholds[:, None], gate, floor=floor) * significance).sum(1)
    *sums, total = average(torch.cat([kept, significance.sum().reshape(1)])).tolist()
    if total <= 0:
        return guess
    # From the largest threshold to the least; the sum of the soft gate is piecewise linear in 1 / threshold.
    inverse = np.interp(coverage * total, sums[::-1], (1 / thresholds).flip(0).numpy())
    return torch.tensor(1 / inverse, dtype=torch.float64)
