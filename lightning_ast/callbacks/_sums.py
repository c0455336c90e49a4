"""Mode ``subset``: whether the user's training step divides its losses by the samples that it sees, or not."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_ast.callbacks._plan import BatchPlan
from lightning_ast.callbacks._processes import Processes

__all__ = ["SumDetector"]

_LARGEST_SHARE = 0.75
"""Share of a batch up to which a mean and a sum over the selected samples can be told from each other."""


class SumDetector:
    """Compares the gradient of the selected samples in their own step with that in the scoring pass, once.

    A mean over k samples in place of B gives each a gradient that is B / k times as large. A sum, or a mean over a
    fixed number, gives the same gradient, so that the step of the selection would be too small. All processes come to
    the same answer.

    Args:
        processes: The distributed processes of this run.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._answer: bool | None = None

    def found_in(self, plan: BatchPlan, norms: Tensor) -> bool:
        """Tell whether the step sums its losses; False as long as it cannot be told.

        Args:
            plan: The plan of the batch, with the norms of the scoring pass, which were multiplied by B.
            norms: ``(k,)`` norms in this step, multiplied by k: of a mean they are those of the scoring pass.
        """
        if self._answer is None:
            self._answer = self._compared(plan, norms)
        return bool(self._answer)

    def _compared(self, plan: BatchPlan, norms: Tensor) -> bool | None:
        assert plan.scored_norms is not None
        ratio = (norms / plan.scored_norms.to(norms)).log()
        ratio = ratio[ratio.isfinite()]
        facts = norms.new_zeros(3)
        if ratio.numel():
            share = ratio.new_tensor(plan.forwarded / plan.batch_size).log()
            facts = torch.stack([ratio.median(), share, torch.ones_like(share)])
        ratio_sum, share_sum, known = self._processes.mean(facts.float().cpu()).double().unbind()
        if not known or share_sum / known > torch.tensor(_LARGEST_SHARE).log():
            return None
        answer = bool((ratio_sum - share_sum).abs() < ratio_sum.abs())
        if answer:
            rank_zero_info(
                "lightning-ast: the training step sums its losses or divides them by a fixed number: in mode='subset' "
                "the gradient of the selected samples is multiplied by the samples of the batch for each selected one."
            )
        return answer
