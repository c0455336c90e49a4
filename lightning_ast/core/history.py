"""Before a batch, in mode ``prune``: remember the significance of every sample, and plan an epoch by it.

The mode decides before an epoch which samples are loaded at all. It decides by what each sample's significance was when
it was last trained on: the scores of the training forward itself, kept by dataset index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.gate import trimmed
from lightning_ast.core.large_plan import each_once
from lightning_ast.core.plan_rules import PlanRules, plan_by_rules
from lightning_ast.core.sample_record import SampleRecord
from lightning_ast.core.selector import SampleSelector
from lightning_ast.words import counted

__all__ = ["EpochPlan", "SignificanceHistory", "plan_epoch", "plan_positions"]

_UNSEEN = -1.0


class SignificanceHistory:
    """The remembered significance of each sample: 4 bytes, and 4 for the running epoch on the scoring device.

    What is observed in an epoch counts from the next :meth:`fold` on. Of a sample that is visited more than once in
    between, in one process or in several, the largest score counts.

    Args:
        size: The number of samples in the data set, at least 1.

    Attributes:
        rules: What the user asks of every plan.
        record: What else is kept of each sample, or None.

    Example:
        >>> history = SignificanceHistory(4)
        >>> history.observe(torch.tensor([0, 2]), torch.tensor([0.5, 0.25]))
        >>> history.fold()
        >>> history.significance()  # what was not seen yet is as significant as the most significant
        tensor([0.5000, 0.5000, 0.2500, 0.5000])
    """

    def __init__(self, size: int) -> None:
        self._scores = torch.full((size,), _UNSEEN)
        self._recent = torch.full((size,), _UNSEEN)
        self._is_foreign = False
        self.rules = PlanRules()
        self.record: SampleRecord | None = None

    def __len__(self) -> int:
        return self._scores.numel()

    @property
    def seen(self) -> Tensor:
        """Return which samples have a remembered significance, ``(N,)`` bool."""
        return self._scores >= 0

    @property
    def quarantined(self) -> Tensor:
        """Return which samples were not finite when they were last trained on, ``(N,)`` bool."""
        return self._scores.isinf()

    @property
    def withheld(self) -> Tensor:
        """Return which samples are planned only where there are too few others, ``(N,)`` bool."""
        return self.quarantined if self.rules.never is None else self.quarantined | self.rules.never

    def begin_with(self, significance: Tensor) -> None:
        """Remember scores that were made elsewhere, ``(N,)`` float32, -1 where a sample has none.

        Their unit may be another one. The first :meth:`fold` with scores of this run multiplies those of all other
        samples by a number, such that both kinds have the same sum over the samples that have both.
        """
        self._scores = significance.clone()
        self._is_foreign = True

    def observe(self, indices: Tensor, significance: Tensor) -> None:
        """Keep the scores of a batch; no device is waited for.

        Args:
            indices: ``(B,)`` int64 dataset indices.
            significance: ``(B,)``, non-negative, on any device; infinity marks a sample that must not be planned until
                it is seen finite.
        """
        significance = significance.detach().float()
        if self._recent.device != significance.device:
            self._recent = self._recent.to(significance.device)
        indices = indices.to(significance.device, non_blocking=True)
        # The largest of several scores: the order of the visits must not matter, for it differs between processes.
        self._recent.scatter_reduce_(0, indices, significance, "amax")

    def fold(self, maximum: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take what was observed since the last time into the remembered significance.

        ``maximum`` takes the element-wise maximum of a tensor over the processes that train together, so that all
        remember the same; None for a single process.
        """
        recent = (self._recent if maximum is None else maximum(self._recent)).cpu()
        if self.record is not None:
            self.record.fold(recent, maximum)
        if self._is_foreign and bool((recent >= 0).any()):
            self._scores = _in_unit_of(self._scores, recent)
            self._is_foreign = False
        self._scores = torch.where(recent >= 0, recent, self._scores)
        self._recent.fill_(_UNSEEN)

    def significance(self, *, trim: float = 0.0) -> Tensor:
        """Return ``(N,)`` on the CPU, as of the last fold.

        A sample that was never seen has the largest significance (1 before any was), one in quarantine has 0, and so
        have those that are never planned, and the largest of those seen, as many as the share ``trim`` of them: see
        :func:`~lightning_ast.core.gate.trimmed`.
        """
        # A copy is changed in place: a data set may be so large that each further one counts.
        scores = self._scores.clone()
        scores.masked_fill_(scores.isinf(), 0)
        most = float(scores.max())
        seen = self.seen
        if trim > 0:
            scores.masked_scatter_(seen, trimmed(scores[seen], trim))
        # What was never seen must be seen soon: it counts as the most significant.
        scores.masked_fill_(~seen, most if most >= 0 else 1.0)
        return scores if self.rules.never is None else scores.masked_fill_(self.rules.never, 0.0)

    def part(self, samples: range) -> SignificanceHistory:
        """Return what is remembered of some of the samples, as of the last fold; no rules hold in it."""
        part = SignificanceHistory(len(samples))
        part._scores = self._scores[samples.start : samples.stop]
        return part

    def state_dict(self, maximum: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """Return two float32 tensors ``(N,)``: remembered, and observed since the last fold (over all processes).

        The third tells whether what is remembered was made elsewhere.
        """
        recent = self._recent if maximum is None else maximum(self._recent)
        return {
            "scores": self._scores.clone(),
            "recent": recent.cpu().clone(),  # one process gives the scores themselves, and they go on changing
            "is_foreign": int(self._is_foreign),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: The state was written for a data set of another size.
        """
        if state["scores"].numel() != len(self):
            raise ValueError(
                f"expected the remembered significance of {counted(len(self), 'sample')}, got that of "
                f"{state['scores'].numel()}: the data set is not the one that the checkpoint was written with."
            )
        self._scores = state["scores"].clone()
        self._recent = state["recent"].clone()
        self._is_foreign = bool(state.get("is_foreign", False))


def _in_unit_of(scores: Tensor, recent: Tensor) -> Tensor:
    both = (recent >= 0) & recent.isfinite() & (scores >= 0)
    old = float(scores[both].double().sum())
    new = float(recent[both].double().sum())
    return torch.where(scores >= 0, scores * (new / old), scores) if old > 0 and new > 0 else scores


@dataclass(frozen=True)
class EpochPlan:
    """Which samples an epoch loads, and in which order.

    Attributes:
        epoch: The number of the epoch, from 0.
        indices: ``(k,)`` int64 dataset indices in the order of loading; several processes take turns.
        offered: The number of samples that a dense epoch would load.
        weights: ``(k,)`` importance weights ``p**-a``, times the rate, or None where all are 1.
    """

    epoch: int
    indices: Tensor
    offered: int
    weights: Tensor | None = None

    @property
    def activation_rate(self) -> float:
        """Return planned / offered, in (0, 1]."""
        return self.indices.numel() / self.offered

    def state_dict(self) -> dict[str, Any]:
        """Return primitives and tensors alone; the indices as int32 where the data set is small enough for it."""
        # The indices are nearly all of a plan, and of a small checkpoint: int32 halves them.
        small = self.indices.numel() == 0 or int(self.indices.max()) < 2**31
        indices = self.indices.to(torch.int32 if small else torch.int64)
        return {"epoch": self.epoch, "indices": indices, "offered": self.offered, "weights": self.weights}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> EpochPlan:
        """Make a plan again from what :meth:`state_dict` gave."""
        return cls(state["epoch"], state["indices"].long(), state["offered"], state["weights"])


def plan_epoch(
    history: SignificanceHistory, draws: Tensor, *, epoch: int, count: int, selector: SampleSelector
) -> EpochPlan:
    """Choose the samples of an epoch among those that the user's sampler drew.

    Args:
        history: The remembered significance, folded.
        draws: ``(n,)`` int64 dataset indices in the sampler's order; one that was drawn twice is offered twice, one in
            quarantine is not offered where the others suffice.
        epoch: The number of the epoch, from 0.
        count: The number of samples to keep, in [1, n]; see :func:`lightning_ast.core.planned_count`.
        selector: The selector with gate, weighting and seed.

    Returns:
        A plan of exactly ``count`` samples in the order of the draws. It depends on the remembered significance, the
        selector's seed and the epoch alone, not on the number of processes. Its weights are scaled by the rate, so that
        the mean loss of a batch estimates that of the whole data set under ``"unbiased"``.
    """
    positions, weights = plan_positions(history, draws, epoch=epoch, count=count, selector=selector)
    offered = draws.numel()
    scaled = None if weights is None else (weights * (count / offered)).float()
    return EpochPlan(epoch, draws[positions], offered, scaled)


def plan_positions(
    history: SignificanceHistory, draws: Tensor, *, epoch: int, count: int, selector: SampleSelector
) -> tuple[Tensor, Tensor | None]:
    """Choose as :func:`plan_epoch` does, and return where in the draws the samples of the plan stand.

    Returns:
        ``(count,)`` increasing positions, and their weights ``p**-a``, or None where all are 1.
    """
    allowed = _allowed(history, draws, count)
    if allowed is not None:
        draws = draws[allowed]
    # In the order of the indices, so that the choice does not depend on the order of the draws.
    positions = each_once(draws, len(history))
    significance = history.significance(trim=selector.trim)
    if positions is None:
        ordered, positions = draws.sort(stable=True)
        significance = significance[ordered]
    else:
        has_rules = history.rules.always is not None or history.record is not None
        ordered = torch.arange(len(history) if has_rules else 0)
    kept = plan_by_rules(
        selector,
        significance,
        count=count,
        epoch=epoch,
        always=history.rules.always_among(ordered),
        classes=None if history.record is None else history.record.classes_of(ordered),
        class_floor=history.rules.class_floor,
    )
    del significance
    if kept.weights is None:  # a mask is cheaper than a sort
        mask = torch.zeros(draws.numel(), dtype=torch.bool)
        mask[positions[kept.indices]] = True
        chosen = mask.nonzero().squeeze(1)
        weights = None
    else:
        chosen, order = positions[kept.indices].long().sort()
        weights = kept.weights[order]
    return chosen if allowed is None else allowed[chosen], weights


def _allowed(history: SignificanceHistory, draws: Tensor, count: int) -> Tensor | None:
    """Return where the draws may be planned; None for everywhere, as where too few others are left."""
    withheld = history.withheld
    if not withheld.any():
        return None
    allowed = (~withheld[draws]).nonzero().squeeze(1)
    return allowed if allowed.numel() >= count else None
