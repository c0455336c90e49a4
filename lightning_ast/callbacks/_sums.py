"""Mode ``subset``: whether the user's training step divides its losses by the samples that it sees, or not."""

from __future__ import annotations

import math

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_ast.callbacks._plan import BatchPlan

__all__ = ["SumDetector"]

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
        ratio = float(ratios.median())
        share = plan.forwarded / plan.batch_size
        sums = abs(math.log(ratio / share)) < abs(math.log(ratio))
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
