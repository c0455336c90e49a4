"""The settings of one fit, read once from the callbacks that hold them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import lightning.pytorch as pl

from lightning_ast.core.controller import PIController
from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.core.partial import BatchNormBackward
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import SignificanceFn, SignificanceName
from lightning_ast.mode_facts import MODE_FACTS, Mode, PruneSteps
from lightning_ast.schedule import Schedule
from lightning_ast.selection.stages import StageSource

__all__ = ["GivenSettings", "SelectionSettings", "steps_of_pruned_epochs"]


class GivenSettings(Protocol):
    """The settings as they were given to the callback: nothing has checked their values yet."""

    target_activation_rate: float | None
    target_coverage: float | None
    mode: Mode
    gate: GateName
    significance: SignificanceName | SignificanceFn
    weighting: Weighting | None
    controller: PIController | None
    min_selected: int | float
    trim: float
    seed: int
    batchnorm: BatchNormBackward
    quarantine_limit: float | None
    count_flops: bool
    prune_steps: PruneSteps | None


def steps_of_pruned_epochs(given: GivenSettings | SelectionSettings) -> PruneSteps:
    """Return how the optimizer steps of a pruned epoch relate to those of a dense one, by what was given."""
    return given.prune_steps or ("replan" if given.target_coverage is None else "keep")


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """What a fit selects by; :class:`~lightning_ast.SparseSelectionCallback` describes each setting.

    Attributes:
        scheduler: The source of the stages; None where every step is sparse.
        state_key: The name of the callback's state in a checkpoint.
    """

    target_activation_rate: float | None
    target_coverage: float | None
    mode: Mode
    gate: GateName
    significance: SignificanceName | SignificanceFn
    weighting: Weighting | None
    controller: PIController | None
    min_selected: int | float
    trim: float
    seed: int
    batchnorm: BatchNormBackward
    quarantine_limit: float | None
    count_flops: bool
    prune_steps: PruneSteps | None
    scheduler: StageSource | None
    state_key: str

    @classmethod
    def names(cls) -> list[str]:
        """List the names of the settings."""
        return [field.name for field in fields(cls)]

    def schedule_of(self, trainer: pl.Trainer) -> Schedule:
        """Return the schedule that a run keeps."""
        return Schedule() if self.scheduler is None else self.scheduler.schedule_of(trainer)

    def selector(self, rank: int) -> SampleSelector:
        """Make the selector of this fit.

        Args:
            rank: The number of this process, which decides its random draws; ``prune`` draws alike in all of them.
        """
        # The hard gates have no keep-probabilities, and with them always weight 1.
        soft: Weighting = self.weighting or ("none" if MODE_FACTS[self.mode].plans_epochs else "sqrt")
        return SampleSelector(
            target_activation_rate=self.target_activation_rate,
            target_coverage=self.target_coverage,
            gate=self.gate,
            weighting=soft if self.gate == "soft" else "none",
            controller=self.controller,
            min_selected=self.min_selected,
            trim=self.trim,
            seed=self.seed,
            rank=0 if MODE_FACTS[self.mode].plans_epochs else rank,
        )

    @property
    def rule(self) -> dict[str, str]:
        """Name what is selected by, for a checkpoint."""
        score = self.significance if isinstance(self.significance, str) else "callable"
        target = "activation rate" if self.target_coverage is None else "coverage"
        return {"mode": self.mode, "gate": self.gate, "significance": score, "target": target}
