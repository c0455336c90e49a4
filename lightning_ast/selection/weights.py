"""What the gradient rows of the selected samples are multiplied by, so that every selected sample counts alike."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_ast.core.gradient_gate import Kept
from lightning_ast.selection.fit_parts import FitParts
from lightning_ast.selection.step_state import Part, StepState, Treatment

__all__ = ["RowWeights"]

_NEAR = 0.2  # distance from the ratio of a sum, as a share of that ratio's distance from 1 (in logarithms)
_MOST = 0.5  # share of the samples that must be near it
# Share of a batch up to which the answer is kept: above it, a mean and a sum are hardly different.
_LARGEST_SHARE = 0.75


class RowWeights:
    """Weighs the selection of a batch as a part of one large batch: of all processes and micro-batches together."""

    def __init__(self, parts: FitParts) -> None:
        self._weighting = parts.selector.weighting
        self._window = parts.window
        self._processes = parts.processes
        self._sums: bool | None = None  # whether the training step sums its losses, once that is clear

    def of_step(self, step: StepState, device: torch.device, finite: Tensor | None = None) -> Kept:
        """Weigh the rows of a step."""
        # The gradient of a mean over B samples has rows that were divided by B. They are multiplied by w * B / d, where
        # d is the sum of the weights w (unbiased: B) over all processes and micro-batches. The user's own weights u are
        # a part of w (unbiased: d is the sum of u over the whole batch).
        return _brought(self._on_host(step, finite), device)

    def of_whole(self, step: StepState, device: torch.device) -> Kept | None:
        """Weigh the rows of a batch that is trained on whole; None where the step is the plain one."""
        # All weigh alike, and the batch counts where it is a part of one large batch: a factor is left where another
        # micro-batch keeps fewer, or another process has a batch of another size.
        kept = self._on_host(step, None)
        assert kept.factors is not None
        is_plain = step.selected == step.batch_size and bool((kept.factors == 1).all())
        return None if is_plain else _brought(kept, device)

    def _on_host(self, step: StepState, finite: Tensor | None) -> Kept:
        assert step.selection is not None
        cleaned = step.treatment is Treatment.CLEANED
        indices = step.selection.indices.cpu()
        # In double precision: the sum of a large batch's weights decides the factor of every one of its rows.
        if step.selection.weights is None or cleaned:
            weights = torch.ones(indices.numel(), dtype=torch.float64)
        else:
            weights = step.selection.weights.to("cpu", torch.float64)
        user = step.user_weights
        if user is not None:
            weights = weights * user[indices]
        if step.part is not None:  # the step has these rows alone, in this order
            indices = torch.arange(step.forwarded)
        if finite is not None:
            indices = indices[finite]
            weights = weights[finite]
        own = float(weights.sum())
        if self._weighting == "unbiased" and not cleaned and not step.is_void:
            everyone = torch.ones(step.batch_size) if user is None else user
            own = float((everyone if step.bad is None else everyone[~step.bad.cpu()]).sum())
        # No other process knows of a dense step that leaves samples out
        shared = own
        if not cleaned:
            shared = self._window.divisor(*self._processes.mean_of(own, float(step.batch_size)))
        factors = weights * (step.forwarded / shared) if shared > 0 else weights
        return Kept(indices, factors, rows_only=cleaned or step.known_bad or finite is not None)

    def of_part(self, step: StepState, part: Part, norms: Tensor, finite: Tensor | None) -> Kept:
        """Weigh the rows of a step that saw the selected samples alone, by their norms ``(k,)`` in it, times k."""
        kept = self.of_step(step, norms.device, finite)
        share = step.forwarded / step.batch_size
        if not self._is_sum(norms, part.norms, share):
            return kept
        assert kept.factors is not None
        return replace(kept, factors=kept.factors * (step.batch_size / step.forwarded))

    def _is_sum(self, norms: Tensor, scored: Tensor, share: float) -> bool:
        """Tell whether the step sums its losses, by norms ``(k,)`` in it, times k, and in the scoring pass, times B."""
        if self._sums is not None:
            return self._sums
        # A mean over k samples in place of B gives each a gradient that is B / k times as large: a ratio of 1. A sum,
        # or a mean over a fixed number, gives the same gradient, so that the step would be too small: a ratio of k / B.
        ratios = norms / scored.to(norms)
        ratios = ratios[ratios.isfinite() & (ratios > 0)]
        if ratios.numel() == 0:
            return False
        near = (ratios / share).log().abs() < _NEAR * abs(math.log(share))  # others' partners may change a norm as well
        sums = float(near.double().mean()) > _MOST
        if share <= _LARGEST_SHARE:
            self._sums = sums
            if sums:
                rank_zero_info(
                    "lightning-ast: the training step sums its losses or divides them by a fixed number: in "
                    "mode='subset' the gradient of the selected samples is multiplied by the samples of the batch for "
                    "each selected one."
                )
        return sums


def _brought(kept: Kept, device: torch.device) -> Kept:
    if device.type == "cpu":
        return kept
    assert kept.factors is not None
    factors = kept.factors.float() if device.type == "mps" else kept.factors  # which has no larger type
    return replace(
        kept, indices=kept.indices.to(device, non_blocking=True), factors=factors.to(device, non_blocking=True)
    )
