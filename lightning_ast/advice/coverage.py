"""What a coverage needs now: the scores of the probed samples, and the activation rates that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_ast.advice.measured import CoverageFacts
from lightning_ast.core.gate import NEARLY_ALL, GateName, floor_for, rate_at_coverage, trimmed
from lightning_ast.selection.step_state import StepState
from lightning_ast.selection.watcher import Watcher

__all__ = ["COVERAGES", "ScoreWatcher", "coverage_facts", "is_nothing_to_skip"]

COVERAGES = (0.9, 0.95, 0.97, 0.99)
"""Coverages that are predicted."""


class ScoreWatcher(Watcher):
    """A collection of the significance of the probed samples, those of each batch once.

    Args:
        position: Returns the number of the batch that was given last, among those that are trained on in turns.

    Attributes:
        scores: ``(B,)`` significance by the number of the batch, NaN where a sample is not finite.
    """

    def __init__(self, position: Callable[[], int]) -> None:
        self._position = position
        self.scores: dict[int, Tensor] = {}

    def finish_batch(self, step: StepState) -> None:
        """Keep the scores of a batch that has none yet; no device is waited for."""
        position = self._position()
        if step.significance is None or position in self.scores:
            return
        scores = step.significance.detach().float()
        if step.bad is not None:
            scores = scores.masked_fill(step.bad.to(scores.device), torch.nan)
        self.scores[position] = scores


def coverage_facts(
    scores: Iterable[Tensor], coverages: Sequence[float], gate: GateName, *, trim: float = 0.0
) -> CoverageFacts | None:
    """Find the activation rates that coverages need, over all samples together.

    Args:
        scores: ``(B,)`` significance of each batch; samples whose score is not finite are left out.
        coverages: The coverages, in (0, 1].
        gate: The gate that selects.
        trim: The share of the most significant samples that is left out.

    Returns:
        The rates; None without a sample.

    Example:
        >>> coverage_facts([torch.tensor([6.0, 1.0]), torch.tensor([2.0, 1.0, torch.nan])], [0.8], "topk")
        CoverageFacts(samples=4, rates={0.8: 0.5})
    """
    pooled = torch.cat([torch.empty(0), *(each.detach().cpu().float().flatten() for each in scores)])
    pooled = pooled[pooled.isfinite()]
    if pooled.numel() == 0:
        return None
    pooled = trimmed(pooled, trim)
    # as the selector of a run does, whose least probability stays below its target
    rates = {c: rate_at_coverage(pooled, c, gate, floor=floor_for(c)) for c in coverages}
    return CoverageFacts(pooled.numel(), rates)


def is_nothing_to_skip(coverage: float, rate: float) -> bool:
    """Tell whether a coverage needs about as large a share of the samples: any would then do as well as those chosen.

    That holds as well where nearly all samples are needed. A coverage of 1 asks for the dense run, whatever the scores.

    Args:
        coverage: The coverage, in (0, 1].
        rate: The activation rate that it needs, in (0, 1].

    Example:
        >>> is_nothing_to_skip(0.8, 0.79), is_nothing_to_skip(0.8, 0.6), is_nothing_to_skip(0.99, 0.95)
        (True, False, True)
    """
    return coverage < 1 and rate >= NEARLY_ALL * coverage
