"""What a coverage needs now: the scores of the probed samples, and the activation rates that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_ast.advice.measured import CoverageFacts
from lightning_ast.core.gate import NEARLY_ALL, GateName, floor_for, trimmed
from lightning_ast.core.threshold import rate_at_coverage
from lightning_ast.selection.step_state import StepState
from lightning_ast.selection.watcher import Watcher

__all__ = ["COVERAGES", "ScoreWatcher", "coverage_facts", "is_nothing_to_skip"]

COVERAGES = (0.9, 0.95, 0.97, 0.99)
"""Coverages that are predicted."""


class ScoreWatcher(Watcher):
    """A collection of the significance of the probed samples, those of each batch once."""

    def __init__(self, position: Callable[[], int]) -> None:
        self._position = position  # returns which of the batches that are trained on in turns was given last
        self.scores: dict[int, Tensor] = {}  # (B,) by the number of the batch, NaN where a sample is not finite

    def finish_batch(self, step: StepState) -> None:
        """Keep the scores of a batch that has none yet."""
        position = self._position()
        if step.significance is None or position in self.scores:
            return
        # no .cpu() here: it would wait for the device within a step that is being timed
        scores = step.significance.detach().float()
        if step.bad is not None:
            scores = scores.masked_fill(step.bad.to(scores.device), torch.nan)
        self.scores[position] = scores


def coverage_facts(
    scores: Iterable[Tensor], coverages: Sequence[float], gate: GateName, *, trim: float = 0.0
) -> CoverageFacts | None:
    """Find the activation rates that coverages need over all samples of ``(B,)`` scores; None without a finite one."""
    pooled = torch.cat([torch.empty(0), *(each.detach().cpu().float().flatten() for each in scores)])
    pooled = pooled[pooled.isfinite()]
    if pooled.numel() == 0:
        return None
    pooled = trimmed(pooled, trim)
    # the floor is that of the selector of a run, whose least probability stays below its target
    rates = {c: rate_at_coverage(pooled, c, gate, floor=floor_for(c)) for c in coverages}
    return CoverageFacts(pooled.numel(), rates)


def is_nothing_to_skip(coverage: float, rate: float) -> bool:
    """Tell whether a coverage needs about as large a share of the samples, and any would do as well as those chosen."""
    # a coverage of 1 asks for the dense run, whatever the scores
    return coverage < 1 and rate >= NEARLY_ALL * coverage
