"""Step 5, gate and controller together: choose samples by their significance, and teach the controller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.controller import PIController, scalar
from lightning_ast.core.gate import (
    NEARLY_ALL,
    GateName,
    Selection,
    Weighting,
    carried_by,
    coverage_of,
    floor_for,
    generator_of,
    lift_zeros,
    minimum_count,
    select,
    trimmed,
    with_class_floor,
)
from lightning_ast.core.large_plan import MANY, planned
from lightning_ast.core.threshold import Average, ShareOf, ThresholdSolver, rate_at_coverage, solve_threshold

__all__ = ["DEFAULT_RATE", "SampleSelector"]

DEFAULT_RATE = 0.4
"""Activation rate where neither it nor a coverage is given."""


class SampleSelector:
    """Chooses the samples of each batch and holds the activation rate, or the coverage, at its target.

    Args:
        target_activation_rate: The share of samples to keep, in (0, 1]; 1 keeps every sample. None without a target
            coverage is 0.4.
        target_coverage: In place of a rate, the share of the summed significance that the fewest samples are to carry,
            in (0, 1]; 1 keeps every sample. Batches that it would keep 95 % of or more are kept whole.
        gate: ``"soft"``, ``"threshold"`` or ``"topk"``, see :mod:`lightning_ast.core.gate`.
        weighting: The importance weights of the soft gate: ``"none"``, ``"sqrt"``, ``"unbiased"``.
        controller: The controller that moves the threshold; None makes a default :class:`PIController`. ``topk``, whose
            threshold is only reported, needs none for a rate; a coverage is held by what is asked of the next batch.
        min_selected: The fewest samples kept, a count or a share of the batch.
        trim: The share of each batch, its most significant samples, that counts as wrong labels, see
            :func:`~lightning_ast.core.gate.trimmed`; in [0, 1).
        class_floor: The share of each class that is kept of every batch, in [0, 1]; :meth:`select` is told the classes.
        seed: The seed of the soft gate's draws. They depend on the seed, the rank and the number of sparse steps so
            far, and on nothing else: the global generators are neither read nor written.
        rank: The number of this process among those that train together.

    Attributes:
        steps: The number of sparse steps so far.
        activation_rate: Selected / offered of the last batch or plan, or None before the first.
        coverage: The share of the summed significance that the samples selected of the last batch or plan carry, or
            None before the first.
        expected_rate: With a target coverage, the activation rate that the last scored batch was expected to need for
            it, over all processes; else None.
        is_whole: Whether the last batch was kept whole because a selection of it would cost more than it saves.
        last_threshold: The threshold of the last batch, a scalar on its device, or None before the first.

    Raises:
        ValueError: Both targets are given.

    Example:
        >>> selector = SampleSelector(target_activation_rate=0.5)
        >>> selector.select(torch.tensor([0.1, 0.9, 0.2, 0.8])).indices.numel()
        2
        >>> selector = SampleSelector(target_coverage=0.8, gate="topk")
        >>> selector.select(torch.tensor([0.1, 0.9, 0.2, 0.8])).indices, round(selector.coverage, 3)
        (tensor([1, 3]), 0.85)
    """

    def __init__(
        self,
        *,
        target_activation_rate: float | None = None,
        target_coverage: float | None = None,
        gate: GateName = "soft",
        weighting: Weighting = "sqrt",
        controller: PIController | None = None,
        min_selected: int | float = 2,
        trim: float = 0.0,
        class_floor: float = 0.0,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        if target_activation_rate is not None and target_coverage is not None:
            raise ValueError(
                "expected target_activation_rate or target_coverage, got both: a rate is held, or a coverage."
            )
        if target_activation_rate is None and target_coverage is None:
            target_activation_rate = DEFAULT_RATE
        self.target_activation_rate = target_activation_rate
        self.target_coverage = target_coverage
        self.gate: GateName = gate
        self.weighting: Weighting = weighting
        self.controller = PIController() if controller is None else controller
        self.min_selected = min_selected
        self.trim = trim
        self.class_floor = class_floor
        self.seed = seed
        self.rank = rank
        self.steps = 0
        self.activation_rate: float | None = None
        self.coverage: float | None = None
        self.expected_rate: float | None = None
        self.is_whole = False
        self.last_threshold: Tensor | None = None

    @property
    def share_of(self) -> ShareOf:
        """Return what the target is a share of."""
        return "samples" if self.target_coverage is None else "significance"

    @property
    def target(self) -> float:
        """Return the share that is held: the target activation rate or coverage."""
        target = self.target_activation_rate if self.target_coverage is None else self.target_coverage
        assert target is not None  # __init__ has set one of them
        return target

    @property
    def _share(self) -> float:
        # `topk` has no threshold that would make up for what other batches kept too much of.
        held = self.gate == "topk" and self.share_of == "significance"
        return self.controller.aim(self.target) if held else self.target

    @property
    def selects(self) -> bool:
        """Tell whether anything is ever left out: not where the target is 1."""
        return self.target < 1

    def select(
        self,
        significance: Tensor,
        *,
        eligible: Tensor | None = None,
        average: Average | None = None,
        classes: Tensor | None = None,
    ) -> Selection:
        """Choose the samples of one batch.

        Args:
            significance: ``(B,)``, non-negative and finite.
            eligible: ``(B,)`` bool, the samples that may be chosen at all; None for all.
            average: A function that averages a tensor over the processes that train together; None for one process.
            classes: ``(B,)`` class indices, for ``class_floor``.

        Returns:
            At least one sample, all of them where the target is 1 or the batch is kept whole; none where none is
            eligible.
        """
        device = significance.device
        significance = significance.detach().cpu()  # one wait, and none for all that follows
        if significance.dtype is torch.bfloat16:  # which numpy does not know
            significance = significance.float()
        if eligible is not None:
            eligible = eligible.cpu()
            significance = significance.where(eligible, torch.zeros_like(significance))
        significance = trimmed(significance, self.trim)
        self.is_whole = False
        if self.selects:
            selection = self._selected(significance, eligible, average)
            if classes is not None and self.class_floor > 0 and not self.is_whole:
                floor = self.class_floor
                selection = with_class_floor(selection, significance, classes.cpu(), floor, eligible=eligible)
        else:
            selection = Selection(torch.arange(significance.numel())).among(eligible)
        self.activation_rate = selection.indices.numel() / significance.numel()
        self.coverage = coverage_of(significance, selection.indices)
        if self.selects:
            self._teach(significance, selection, average)
        self.steps += 1
        return selection.to(device)

    def _selected(self, significance: Tensor, eligible: Tensor | None, average: Average | None) -> Selection:
        size = significance.numel()
        floor = floor_for(self.target)
        rate = self.target
        expected = None
        lifted = lift_zeros(significance)
        by_count = ThresholdSolver(lifted, self.gate, floor=floor, share_of="samples")
        solver = by_count
        if self.share_of == "significance":
            solver = ThresholdSolver(significance, self.gate, floor=floor, share_of="significance")
            rate = solver.rate(self.target)
            if eligible is not None and bool(eligible.any()):
                rate = rate_at_coverage(significance[eligible], self.target, self.gate, floor=floor)
            expected = max(rate, self.least(size) / size)
            if self.gate == "topk":
                rate = solver.rate(self._share)
        self.last_threshold = self._threshold(solver, expected, average)
        # It is the rate of all processes together: all keep their batches whole, or none.
        if self.expected_rate is not None and self.expected_rate >= NEARLY_ALL:
            self.is_whole = True
            return Selection(torch.arange(size)).among(eligible)
        generator = generator_of(self.seed, self.rank, self.steps)
        threshold = float(self.last_threshold)
        if self.gate == "soft":
            threshold = by_count.with_few_counts(threshold, generator)
        return select(
            lifted,
            threshold,
            gate=self.gate,
            rate=rate,
            weighting=self.weighting,
            min_selected=self.min_selected,
            generator=generator,
            floor=floor,
            eligible=eligible,
        )

    def _threshold(self, solver: ThresholdSolver, expected: float | None, average: Average | None) -> Tensor:
        """Return the threshold of a batch, and set the rate that is expected of it over all processes."""
        by_rank = self.gate == "topk"
        solved = solver.threshold(self._share) if by_rank or self.controller.uses_feedforward else None
        own = None if by_rank else solved
        shared: Tensor | float | None = own
        if average is not None and expected is not None:
            shared, expected = solver.shared(self.target, own, expected, average)
        elif average is not None and own is not None:
            shared = average(scalar(own).log()).exp()  # the controller works in logarithms
        self.expected_rate = expected
        if by_rank:
            assert solved is not None
            return scalar(solved)
        return self.controller.threshold(shared, target=self.target, alone=self.share_of == "significance")

    def _teach(self, significance: Tensor, selection: Selection, average: Average | None) -> None:
        """Let the controller learn from what was selected; those of all processes learn the same."""
        kept = selection.indices.numel()
        rate = kept / significance.numel()
        lowest = float(kept <= self.least(significance.numel()))
        if self.share_of == "samples":
            if average is not None:
                rate, lowest = average(torch.tensor([rate, lowest])).tolist()  # one exchange for both
            self.controller.update(rate, target=self.target, at_minimum=lowest > 0)
            return
        sums = list(carried_by(significance, selection.indices))
        if average is not None:  # of the sums, not of their quotients: as of one large batch
            *sums, rate, lowest = average(torch.tensor([*sums, rate, lowest], dtype=torch.float64)).tolist()
        # The controller would take the coverage of a whole batch, which it did not cause, for an error of its own.
        if self.is_whole or sums[1] <= 0:  # no selection was made, or none could carry anything
            self.controller.follow(rate)
            return
        coverage = min(1.0, sums[0] / sums[1])
        self.controller.update(rate, target=self.target, at_minimum=lowest > 0, coverage=coverage)

    def pass_over(self) -> None:
        """Count a batch that is kept whole without a score."""
        # The last expected rate told that scoring would not pay.
        self.is_whole = True
        self.activation_rate = 1.0
        self.coverage = 1.0
        self.controller.follow(1.0)
        self.steps += 1

    def plan(self, significance: Tensor, *, count: int, epoch: int) -> Selection:
        """Choose exactly ``count`` samples of a whole epoch at once; where the gate is soft, with their weights.

        Args:
            significance: ``(n,)`` of the samples on offer, non-negative and finite, on the CPU.
            count: The number of samples to keep, in [1, n].
            epoch: The number of the epoch, in place of the number of steps in the seed of the draw.
        """
        size = significance.numel()
        rate = count / size
        self.activation_rate = rate
        self.controller.update(rate, target=rate)  # solved over all samples: there is no error left to correct
        if count == size:
            self.coverage = 1.0
            return Selection(torch.arange(size))
        # A hard cut at a threshold could miss the count, which schedules were planned by.
        gate: GateName = "soft" if self.gate == "soft" else "topk"
        floor = floor_for(rate)
        generator = generator_of(self.seed, self.rank, epoch)
        if size > MANY:
            kept, self.last_threshold, self.coverage = planned(
                significance, count, gate, floor, self.weighting, generator
            )
            return kept
        lifted = lift_zeros(significance.double())
        self.last_threshold = solve_threshold(lifted, rate, gate, floor=floor)
        kept = select(
            lifted,
            self.last_threshold,
            gate=gate,
            rate=rate,
            weighting=self.weighting,
            min_selected=count,
            generator=generator,
            floor=floor,
        )  # rounding errors may draw one too many
        kept = Selection(kept.indices[:count], None if kept.weights is None else kept.weights[:count])
        self.coverage = coverage_of(significance, kept.indices)
        return kept

    def least(self, batch_size: int) -> int:
        """Return the fewest samples that are kept of a batch of this size."""
        return minimum_count(batch_size, self.min_selected)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: primitives and tensors alone."""
        return {
            "steps": self.steps,
            "activation_rate": self.activation_rate,
            "coverage": self.coverage,
            "expected_rate": self.expected_rate,
            "threshold": None if self.last_threshold is None else self.last_threshold.cpu(),
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, controller: bool = True) -> None:
        """Restore what :meth:`state_dict` gave; the controller's part only where its threshold means the same."""
        self.steps = state["steps"]
        self.activation_rate = state["activation_rate"]
        self.coverage = state.get("coverage")
        self.last_threshold = state["threshold"]
        if controller:
            self.expected_rate = state.get("expected_rate")
            self.controller.load_state_dict(state["controller"])
