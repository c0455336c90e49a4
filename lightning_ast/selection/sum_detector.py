"""Mode ``subset``: whether the user's training step divides its losses by the samples that it sees, or not."""

from __future__ import annotations

import math

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_ast.selection.step_state import BatchPlan

__all__ = ["SumDetector"]

_NEAR = 0.2
"""Distance from the ratio of a sum, as a share of that ratio's distance from 1 (in logarithms)."""
_MOST = 0.5
"""Share of the samples that must be near it."""
_LARGEST_SHARE = 0.75
"""Share of a batch up to which the answer is kept: above it, a mean and a sum are hardly different."""


class SumDetector:
    """Compares the gradient of the selected samples in their own step with that in the scoring pass, once.

    A mean over k samples in place of B gives each a gradient that is B / k times as large. A sum, or a mean over a
    fixed number, gives the same gradient, so that the step of the selection would be too small.
    """

    def __init__(self) -> None:
        self._answer: bool | None = None

    def found_in(self, plan: BatchPlan, norms: Tensor) -> bool:
        """Tell whether the step sums its losses.

        Args:
            plan: The plan of the batch, with the norms of the scoring pass, which were multiplied by B.
            norms: ``(k,)`` norms in this step, multiplied by k: of a mean they are those of the scoring pass.
        """
        if self._answer is not None:
            return self._answer
        assert plan.scored_norms is not None
        ratios = norms / plan.scored_norms.to(norms)
        ratios = ratios[ratios.isfinite() & (ratios > 0)]
        if ratios.numel() == 0:
            return False
        share = plan.forwarded / plan.batch_size
        near = (ratios / share).log().abs() < _NEAR * abs(math.log(share))  # others' partners may change a norm as well
        sums = float(near.double().mean()) > _MOST
        if share <= _LARGEST_SHARE:
            self._answer = sums
            self._tell(sums)
        return sums

    @staticmethod
    def _tell(sums: bool) -> None:
        if sums:
            rank_zero_info(
                "lightning-ast: the training step sums its losses or divides them by a fixed number: in mode='subset' "
                "the gradient of the selected samples is multiplied by the samples of the batch for each selected one."
            )
