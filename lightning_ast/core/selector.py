"""Step 5, gate and controller together: choose samples by their significance, and teach the controller."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.controller import PIController
from lightning_ast.core.gate import (
    FLOOR,
    GateName,
    Selection,
    Weighting,
    lift_zeros,
    minimum_count,
    select,
    solve_threshold,
)

__all__ = ["SampleSelector"]


class SampleSelector:
    """Chooses the samples of each batch and holds the activation rate at its target.

    Args:
        target_activation_rate: The share of samples to keep, in (0, 1]; 1 keeps every sample.
        gate: ``"soft"``, ``"threshold"`` or ``"topk"``, see :mod:`lightning_ast.core.gate`.
        weighting: The importance weights of the soft gate: ``"none"``, ``"sqrt"``, ``"unbiased"``.
        controller: The controller that moves the threshold; None makes a default :class:`PIController`. ``topk`` needs
            none: its threshold is only reported.
        min_selected: The fewest samples kept, a count or a share of the batch.
        seed: The seed of the soft gate's draws. They depend on the seed, the rank and the number of sparse steps so
            far, and on nothing else: the global generators are neither read nor written.
        rank: The number of this process among those that train together.

    Attributes:
        steps: The number of sparse steps so far.
        activation_rate: Selected / offered of the last batch, or None before the first.
        last_threshold: The threshold of the last batch, a scalar on its device, or None before the first.

    Example:
        >>> selector = SampleSelector(target_activation_rate=0.5)
        >>> selector.select(torch.tensor([0.1, 0.9, 0.2, 0.8])).indices.numel()
        2
    """

    def __init__(
        self,
        *,
        target_activation_rate: float = 0.4,
        gate: GateName = "soft",
        weighting: Weighting = "sqrt",
        controller: PIController | None = None,
        min_selected: int | float = 2,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.target_activation_rate = target_activation_rate
        self.gate: GateName = gate
        self.weighting: Weighting = weighting
        self.controller = PIController() if controller is None else controller
        self.min_selected = min_selected
        self.seed = seed
        self.rank = rank
        self.steps = 0
        self.activation_rate: float | None = None
        self.last_threshold: Tensor | None = None

    def select(
        self,
        significance: Tensor,
        *,
        eligible: Tensor | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
    ) -> Selection:
        """Choose the samples of one batch.

        Args:
            significance: ``(B,)``, non-negative and finite.
            eligible: ``(B,)`` bool, the samples that may be chosen at all; None for all.
            average: A function that averages a tensor over the processes that train together, so that their controllers
                stay one; None for a single process.

        Returns:
            At least one sample, all of them where the target is 1; none where none is eligible.
        """
        target = self.target_activation_rate
        size = significance.numel()
        device = significance.device
        significance = significance.detach().cpu()  # one wait, and none for all that follows
        if eligible is not None:
            eligible = eligible.cpu()
            significance = significance.where(eligible, torch.zeros_like(significance))
        significance = lift_zeros(significance)
        floor = min(FLOOR, 0.1 * target)
        if target >= 1:
            selection = Selection(torch.arange(size, device=significance.device)).among(eligible)
        else:
            self.last_threshold = self._threshold(significance, floor, average)
            selection = select(
                significance,
                self.last_threshold,
                gate=self.gate,
                rate=target,
                weighting=self.weighting,
                min_selected=self.min_selected,
                generator=self._generator(self.steps),
                floor=floor,
                eligible=eligible,
            )
        kept = selection.indices.numel()
        self.activation_rate = kept / size
        if target < 1:
            self._teach(self.activation_rate, kept <= self.least(size), average)
        self.steps += 1
        return selection.to(device)

    def _teach(self, rate: float, at_minimum: bool, average: Callable[[Tensor], Tensor] | None) -> None:
        """Let the controller learn from an activation rate; those of all processes learn the same."""
        lowest = float(at_minimum)
        if average is not None:
            rate, lowest = average(torch.tensor([rate, lowest])).tolist()  # one exchange for both
        self.controller.update(rate, target=self.target_activation_rate, at_minimum=lowest > 0)

    def plan(self, significance: Tensor, *, count: int, epoch: int) -> Selection:
        """Choose the samples of a whole epoch at once.

        The threshold is solved over all of them, exactly: there is no error left for the controller, which only keeps
        the running mean of the rate. The hard gates keep the ``count`` most significant.

        Args:
            significance: ``(n,)`` of the samples on offer, non-negative and finite, on the CPU.
            count: The number of samples to keep, in [1, n].
            epoch: The number of the epoch, in place of the number of steps in the seed of the draw.

        Returns:
            Exactly ``count`` samples; each with its keep-probability where the gate is soft.
        """
        size = significance.numel()
        rate = count / size
        self.activation_rate = rate
        self.controller.update(rate, target=rate)
        if count == size:
            return Selection(torch.arange(size))
        significance = lift_zeros(significance.double())
        gate: GateName = "soft" if self.gate == "soft" else "topk"
        floor = min(FLOOR, 0.1 * rate)
        self.last_threshold = solve_threshold(significance, rate, gate, floor=floor)
        kept = select(
            significance,
            self.last_threshold,
            gate=gate,
            rate=rate,
            weighting=self.weighting,
            min_selected=count,
            generator=self._generator(epoch),
            floor=floor,
        )  # rounding errors may draw one too many
        return Selection(kept.indices[:count], None if kept.weights is None else kept.weights[:count])

    def least(self, batch_size: int) -> int:
        """Return the fewest samples that are kept of a batch of this size."""
        return minimum_count(batch_size, self.min_selected)

    def _threshold(self, significance: Tensor, floor: float, average: Callable[[Tensor], Tensor] | None) -> Tensor:
        if self.gate == "topk":
            return solve_threshold(significance, self.target_activation_rate, "topk", floor=floor)
        solved = None
        if self.controller.uses_feedforward:
            solved = solve_threshold(significance, self.target_activation_rate, self.gate, floor=floor)
            if average is not None:
                solved = average(solved.log()).exp()  # the controller works in logarithms
        return self.controller.threshold(solved, target=self.target_activation_rate)

    def _generator(self, step: int) -> torch.Generator:
        """Make a generator for this step alone: there is nothing to save, and every rank draws its own."""
        digest = hashlib.blake2b(f"{self.seed}/{self.rank}/{step}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # to fit into 63 bits

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: primitives and tensors alone."""
        threshold = None if self.last_threshold is None else self.last_threshold.cpu()
        return {
            "steps": self.steps,
            "activation_rate": self.activation_rate,
            "threshold": threshold,
            "controller": self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, controller: bool = True) -> None:
        """Restore what :meth:`state_dict` gave; the controller's part only where its threshold means the same."""
        self.steps = state["steps"]
        self.activation_rate = state["activation_rate"]
        self.last_threshold = state["threshold"]
        if controller:
            self.controller.load_state_dict(state["controller"])
