"""A target that follows the run: a rate or a coverage that the user's function gives at the start of each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ast.core.selector import SampleSelector
from lightning_ast.errors import ConfigurationError

__all__ = ["MovingTarget", "TargetFn"]

TargetFn: TypeAlias = Callable[[int, Mapping[str, Tensor]], float]
"""Takes the number of the epoch, from 0, and ``trainer.callback_metrics``; returns a rate or a coverage in (0, 1]."""


class MovingTarget:
    """Sets the target of a selector at the start of each epoch; all processes hold the value of rank 0."""

    def __init__(self, function: TargetFn, selector: SampleSelector, trainer: pl.Trainer) -> None:
        self._function = function
        self._setting = "target_activation_rate" if selector.target_coverage is None else "target_coverage"
        self._selector = selector
        self._trainer = trainer
        self._epoch: int | None = None
        self._restored: dict[str, float] = {}

    def begin(self, epoch: int) -> None:
        """Ask for the target of an epoch; later calls for the same epoch change nothing."""
        if epoch == self._epoch:
            return
        value = self._asked(epoch)
        # Metrics that are not synchronised differ between processes, and all must hold one target.
        setattr(self._selector, self._setting, self._trainer.strategy.broadcast(value))
        self._epoch = epoch

    def _asked(self, epoch: int) -> float:
        setting = self._setting
        metrics = self._metrics()
        try:
            value: Any = self._function(epoch, metrics)
        except KeyError as error:
            if error.args[:1] == () or error.args[0] in metrics:
                raise
            known = ", ".join(map(repr, sorted(metrics))) or "none"
            raise ConfigurationError(
                f"{setting}: at the start of epoch {epoch} the function asked for the metric {error.args[0]!r}, "
                f"and the metrics known by then are: {known}. Ahead of the first epoch there are none: use "
                "metrics.get() with a value for that case."
            ) from error
        scalar = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
        number = float(value) if scalar and torch.as_tensor(value).numel() == 1 else None
        if number is None or not 0 < number <= 1:
            kind = setting.removeprefix("target_").replace("_", " ")
            raise ConfigurationError(
                f"{setting}: expected the function to return a number in (0, 1], the {kind} of epoch {epoch}, got "
                f"{value!r}."
            )
        return number

    def _metrics(self) -> dict[str, Tensor]:
        # A resumed run has logged nothing yet: what the interrupted one had logged takes its place.
        restored = {name: torch.tensor(value) for name, value in self._restored.items()}
        return {**restored, **self._trainer.callback_metrics}

    def state_dict(self) -> dict[str, Any]:
        """Return the target with its epoch, and the metrics that the next one may be made of."""
        metrics = {name: float(value) for name, value in self._metrics().items()}
        return {"epoch": self._epoch, "value": self._selector.target, "metrics": metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold the target that a state was made with, until its epoch has ended."""
        self._epoch = state["epoch"]
        self._restored = dict(state["metrics"])
        setattr(self._selector, self._setting, state["value"])
