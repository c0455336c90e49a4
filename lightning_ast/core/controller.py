"""Step 5, the threshold: turn the activation rate, or the coverage, so far into the threshold of the next gate."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["PIController", "scalar"]

_LARGEST_STEP = 2.0  # in the threshold's logarithm: a batch counts as at most 7.4 times off
_NOTHING = math.log(1e-25)  # below: a batch whose significance is 0 throughout


class _Preset(NamedTuple):
    kp: float
    ki: float
    ema_alpha: float
    initial_threshold: float | None
    threshold_bounds: tuple[float, float]
    integral_limit: float
    feedforward_alpha: float | None


_PRESETS = {
    "default": _Preset(0.5, 0.05, 0.1, None, (0.0, math.inf), 50.0, 0.3),
    "original": _Preset(0.005, 0.0001, 0.1, 3.0, (0.5, 10.0), 100.0, None),
}


class PIController:
    """Holds the activation rate, or the coverage, at its target by moving the threshold.

    With feed-forward (the default) the threshold is ``exp(m) * exp(kp * e + ki * E)``, where m is the running mean of
    the logarithm of the threshold that each batch would need on its own, ``e = ema(rate) / target - 1`` the relative
    error and E its clamped sum. Logarithms and relative errors make it indifferent to the scale of the loss and to the
    target; the feed-forward makes the first sparse batch right, and the PI part removes what is left. Where a coverage
    is held, it stands in the place of the rate, and the batch's own threshold in that of the running mean.

    Without feed-forward it is the original package's rule: ``threshold += kp * e + ki * E`` with the absolute error
    ``e = ema(rate) - target``, clamped to the bounds. It takes thousands of steps to settle.
    Source: adaptive-sparse-training 1.0, ``SundewAlgorithm.select_samples``.

    Args:
        preset: ``"default"`` or ``"original"`` (the published gains and bounds for a target of 40 %); every argument
            given overrides the preset's value. The original's gains for 10 % are ``kp=0.0015, ki=0.00005,
            ema_alpha=0.3, initial_threshold=0.5``, for 6 % ``kp=0.0008, ki=0.000002``.
        kp: The proportional gain, >= 0.
        ki: The integral gain, >= 0, per step.
        ema_alpha: The weight of the newest activation rate or coverage in its running mean, in (0, 1].
        initial_threshold: The threshold of the first sparse step; None takes the first batch's own.
        threshold_bounds: The least and the greatest threshold.
        integral_limit: The bound on the absolute value of E.
        feedforward_alpha: The weight of the newest batch in m, in (0, 1]; None keeps the preset's.

    Attributes:
        activation_rate_ema: The running mean of the activation rate, whatever is held; None before the first batch.

    Raises:
        ValueError: A value is out of its range; all faults are named together.

    Example:
        >>> controller = PIController(preset="original", kp=0.0015, ki=0.00005, ema_alpha=0.3, initial_threshold=0.5)
        >>> float(controller.threshold(None, target=0.1))
        0.5
        >>> controller.update(0.9, target=0.1)
        >>> float(controller.threshold(None, target=0.1)) > 0.5
        True
    """

    def __init__(
        self,
        *,
        preset: Literal["default", "original"] = "default",
        kp: float | None = None,
        ki: float | None = None,
        ema_alpha: float | None = None,
        initial_threshold: float | None = None,
        threshold_bounds: tuple[float, float] | None = None,
        integral_limit: float | None = None,
        feedforward_alpha: float | None = None,
    ) -> None:
        if preset not in _PRESETS:
            raise ValueError(f"expected preset to be one of {sorted(_PRESETS)}, got {preset!r}.")
        own = _PRESETS[preset]
        low, high = own.threshold_bounds if threshold_bounds is None else threshold_bounds
        self.kp = own.kp if kp is None else kp
        self.ki = own.ki if ki is None else ki
        self.ema_alpha = own.ema_alpha if ema_alpha is None else ema_alpha
        self.initial_threshold = own.initial_threshold if initial_threshold is None else initial_threshold
        self.threshold_bounds = (float(low), float(high))
        self.integral_limit = own.integral_limit if integral_limit is None else integral_limit
        self.feedforward_alpha = own.feedforward_alpha if feedforward_alpha is None else feedforward_alpha
        self._check()
        self.reset()

    def _check(self) -> None:
        low, high = self.threshold_bounds
        start = self.initial_threshold
        newest = self.feedforward_alpha
        checks = {
            f"kp and ki must be >= 0, got {self.kp} and {self.ki}": self.kp >= 0 and self.ki >= 0,
            f"ema_alpha must be in (0, 1], got {self.ema_alpha}": 0 < self.ema_alpha <= 1,
            f"threshold_bounds must satisfy 0 <= low < high, got {(low, high)}": 0 <= low < high,
            f"integral_limit must be > 0, got {self.integral_limit}": self.integral_limit > 0,
            f"feedforward_alpha must be None or in (0, 1], got {newest}": newest is None or 0 < newest <= 1,
            f"initial_threshold must be > 0, got {start}": start is None or start > 0,
            "initial_threshold is needed where feedforward_alpha is None": start is not None or newest is not None,
        }
        faults = [text for text, holds in checks.items() if not holds]
        if faults:
            raise ValueError("PIController: " + "; ".join(faults) + ".")

    @property
    def uses_feedforward(self) -> bool:
        """Tell whether :meth:`threshold` wants each batch's own threshold."""
        return self.feedforward_alpha is not None

    def reset(self) -> None:
        """Forget everything learned: the state before the first sparse step."""
        self.activation_rate_ema: float | None = None
        self._held_ema: float | None = None  # of the rate or of the coverage, whichever has a target
        self._integral = 0.0
        self._level = None if self.initial_threshold is None else float(self.initial_threshold)
        if self._level is not None and self.uses_feedforward:
            self._level = math.log(self._level)

    def threshold(self, solved: Tensor | float | None, *, target: float, alone: bool = False) -> Tensor:
        """Return the threshold to gate this batch with, a scalar tensor on the CPU.

        Args:
            solved: The threshold that this batch would need on its own, a scalar
                (:func:`lightning_ast.core.threshold.solve_threshold`); not used without feed-forward.
            target: The target activation rate or coverage, in (0, 1].
            alone: Whether ``solved`` counts alone, as for a coverage, and not in the running mean.

        Raises:
            ValueError: ``solved`` is missing where feed-forward needs it.
        """
        if not self.uses_feedforward:
            assert self._level is not None  # reset() set it, __init__ checked it
            return scalar(self._level)
        if solved is None:
            raise ValueError("feed-forward needs the batch's own threshold: pass solve_threshold(...) as `solved`.")
        own = float(solved)
        # The share that a sample carries depends on the batch that it is in, so a coverage has no running threshold.
        newest = math.log(own)
        self._level = newest if self._level is None or alone else self._follow(self._level, newest)
        if newest < _NOTHING:
            return scalar(own)  # all samples are alike: any of them
        low, high = self.threshold_bounds
        threshold = math.exp(self._level) * self._correction(target)
        return scalar(max(low, min(high, threshold)))

    def aim(self, target: float) -> float:
        """Return the coverage to ask of a batch without a threshold, for a running one of ``target``."""
        # The fewest samples that carry a coverage carry a little more than it.
        return min(1.0, target / self._correction(target)) if self.uses_feedforward else target

    def _correction(self, target: float) -> float:
        correction = self.kp * self._error(target) + self.ki * self._integral
        return math.exp(max(-20.0, min(20.0, correction)))  # far off, exp would overflow

    def _follow(self, level: float, newest: float) -> float:
        assert self.feedforward_alpha is not None
        # A batch without significance, of which all labels are ignored, moves nothing; an outlier moves a bounded step.
        if level < _NOTHING:
            return newest
        step = max(-_LARGEST_STEP, min(_LARGEST_STEP, newest - level))
        return level if newest < _NOTHING else level + self.feedforward_alpha * step

    def update(
        self, activation_rate: float, *, target: float, at_minimum: bool = False, coverage: float | None = None
    ) -> None:
        """Learn from what the gate let through.

        Args:
            activation_rate: Selected / offered of the last batch, in [0, 1].
            target: The target activation rate in (0, 1], or the target coverage.
            at_minimum: Whether the fewest samples allowed were kept, and not what the threshold alone would have kept.
            coverage: The coverage of the last batch, in [0, 1], where the target is one; else None.
        """
        held = activation_rate if coverage is None else coverage
        # It begins at the target, so that the first batch alone corrects little.
        self._held_ema = self._mean(self._held_ema, held, start=target)
        if coverage is None:
            self.activation_rate_ema = self._held_ema
        else:
            self.follow(activation_rate)
        if self.uses_feedforward:
            error = self._error(target)
            # Anti-windup: the fallback, not the threshold, has set the count: a higher threshold would not lower it.
            if not (at_minimum and error > 0):
                self._integrate(error)
        else:
            self._step_original(self._held_ema - target)

    def follow(self, activation_rate: float) -> None:
        """Take the activation rate of a batch into its running mean, and learn nothing from it."""
        self.activation_rate_ema = self._mean(self.activation_rate_ema, activation_rate, start=activation_rate)

    def _mean(self, last: float | None, newest: float, *, start: float) -> float:
        last = start if last is None else last
        return last + self.ema_alpha * (newest - last)

    def _error(self, target: float) -> float:
        return 0.0 if self._held_ema is None else self._held_ema / target - 1

    def _integrate(self, error: float) -> None:
        self._integral = max(-self.integral_limit, min(self.integral_limit, self._integral + error))

    def _step_original(self, error: float) -> None:
        assert self._level is not None
        low, high = self.threshold_bounds
        if low < self._level < high:
            self._integrate(error)
        else:
            self._integral *= 0.9  # as in the original: at a bound, what piled up would keep it there
        self._level = min(high, max(low, self._level + self.kp * error + self.ki * self._integral))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: primitives and tensors alone."""
        return {
            "activation_rate_ema": self.activation_rate_ema,
            "held_ema": self._held_ema,
            "integral": self._integral,
            "level": None if self._level is None else scalar(self._level),
            "feedforward": self.uses_feedforward,
            "integral_limit": float(self.integral_limit),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, as far as it means the same with this controller's settings."""
        self.reset()
        self.activation_rate_ema = state["activation_rate_ema"]
        self._held_ema = state.get("held_ema", self.activation_rate_ema)
        if state.get("feedforward", self.uses_feedforward) != self.uses_feedforward:
            return  # a logarithm is no threshold, and relative errors are not absolute ones
        self._integral = max(-self.integral_limit, min(self.integral_limit, state["integral"]))
        if state["level"] is not None:  # it is saved before the first sparse step, too
            self._level = float(state["level"])


def scalar(value: float) -> Tensor:
    """Make the tensor of a threshold."""
    return torch.scalar_tensor(value, dtype=torch.float64)
