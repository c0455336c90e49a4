"""The original's rule as its README and scripts have it: a score of losses, a hard cut, a PI controller, a fallback."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_ast.callbacks import SparseSelectionCallback
from lightning_ast.core.controller import PIController
from lightning_ast.core.significance import loss_entropy, loss_intensity

__all__ = ["OriginalRule"]

_RANDOM = 2
_LARGEST = 0.1
_JUST_ABOVE = 1.001


class OriginalRule(SparseSelectionCallback):
    """Selects as the original's scripts do, in mode ``mask``: the forward and the whole backward are computed.

    The samples whose score is above the threshold are trained on, and a few others where these are too few.

    Args:
        target_activation_rate: The share of the samples to train on, in (0, 1].
        score: ``"loss_intensity"``: 0.7 relative loss + 0.3 relative intensity; ``"loss_entropy"``: 0.7 loss + 0.3
            entropy.
        initial_threshold: The threshold of the first sparse step.
        kp: The proportional gain.
        ki: The integral gain, per step.
        ema_alpha: The weight of the newest activation rate in its running mean.
        fallback: ``"largest"``: the largest scores, until a tenth of the batch and at least 2 samples are kept, as in
            its ImageNet scripts and its package; ``"random"``: 2 random samples where none would be kept, as its
            README has it for CIFAR-10.
        threshold_bounds: The least and the greatest threshold.
        integral_limit: The bound on the sum of the errors.
        seed: The seed of the two random samples.

    Example:
        >>> OriginalRule(target_activation_rate=0.1, initial_threshold=0.5, kp=0.0015, ki=0.00005, ema_alpha=0.3).mode
        'mask'
    """

    def __init__(
        self,
        *,
        target_activation_rate: float = 0.4,
        score: Literal["loss_intensity", "loss_entropy"] = "loss_entropy",
        initial_threshold: float = 3.0,
        kp: float = 0.005,
        ki: float = 0.0001,
        ema_alpha: float = 0.1,
        fallback: Literal["largest", "random"] = "largest",
        threshold_bounds: tuple[float, float] = (0.5, 10.0),
        integral_limit: float = 100.0,
        seed: int = 0,
    ) -> None:
        self.score = score
        self.fallback = fallback
        super().__init__(
            target_activation_rate=target_activation_rate,
            mode="mask",
            gate="threshold",
            significance=self._scored,
            min_selected=_LARGEST if fallback == "largest" else 1,
            seed=seed,
            controller=PIController(
                preset="original",
                kp=kp,
                ki=ki,
                ema_alpha=ema_alpha,
                initial_threshold=initial_threshold,
                threshold_bounds=threshold_bounds,
                integral_limit=integral_limit,
            ),
        )

    def _scored(self, losses: Tensor, logits: Tensor | None, inputs: Tensor | None, targets: Tensor | None) -> Tensor:
        """Score the samples ``(B,)``; a random fallback lifts two above the threshold where none would pass."""
        score = loss_intensity if self.score == "loss_intensity" else loss_entropy
        scores = score(losses, logits, inputs, targets)
        if self.fallback == "largest":
            return scores
        assert self.controller is not None
        assert self.session is not None
        threshold = float(self.controller.threshold(None, target=1.0))  # it does not depend on the target
        if not bool((scores > threshold).any()):
            steps = self.session.selector.steps
            draw = torch.Generator().manual_seed(self.seed + 1_000_003 * steps)  # the same after a resume
            lifted = torch.randperm(len(scores), generator=draw)[:_RANDOM].to(scores.device)
            scores = scores.index_fill(0, lifted, _JUST_ABOVE * threshold)
        return scores
