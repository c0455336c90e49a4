"""The settings of one fit, read once from the callbacks that hold them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import lightning.pytorch as pl

from lightning_ast.core.controller import PIController
from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.core.partial.rows import BatchNormBackward
from lightning_ast.core.selector import SampleSelector
from lightning_ast.core.significance import SignificanceFn, SignificanceName
from lightning_ast.mode_facts import MODE_FACTS, Mode, PruneSteps
from lightning_ast.pruning.sample_book import SampleSettings
from lightning_ast.schedule import Schedule, Stage
from lightning_ast.selection.moving_target import TargetFn
from lightning_ast.streams import SampleFilter

__all__ = ["SelectionSettings", "StageSource"]


class StageSource(Protocol):
    """What a fit asks for its stages: a :class:`~lightning_ast.TwoStageScheduler`, or a subclass of a user's own."""

    target_activation_rate: float | None

    def stage(self, trainer: pl.Trainer, batch_idx: int) -> Stage:
        """Return the stage of a training batch."""

    def faults(self, trainer: pl.Trainer, *, batches_known: bool, whole_epochs: bool = False) -> list[str]:
        """Find everything wrong with the stages that can be known."""

    def schedule_of(self, trainer: pl.Trainer) -> Schedule:
        """Return the schedule that this run keeps."""


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """What a fit selects by; :class:`~lightning_ast.SparseSelectionCallback` describes each setting."""

    target_activation_rate: float | TargetFn | None
    target_coverage: float | TargetFn | None
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
    samples: SampleSettings
    sample_filter: SampleFilter | None = None
    scheduler: StageSource | None = None

    @classmethod
    def of(cls, callback: object, scheduler: StageSource | None = None) -> SelectionSettings:
        """Read the attributes of a selection callback as they were given: nothing has checked their values yet."""
        names = [field.name for field in fields(cls) if field.name != "scheduler"]
        return cls(**{name: getattr(callback, name) for name in names}, scheduler=scheduler)

    @property
    def steps_of_pruned_epochs(self) -> PruneSteps:
        """Return how the optimizer steps of a pruned epoch relate to those of a dense one."""
        return self.prune_steps or ("keep" if self.has_moving_rate else "replan")

    @property
    def has_moving_rate(self) -> bool:
        """Tell whether the activation rate may change from epoch to epoch: with a coverage, or a function."""
        return self.target_coverage is not None or callable(self.target)

    @property
    def scheduled_rate(self) -> float | None:
        """Return the schedule's activation rate, which takes the place of the callback's; None without one."""
        return None if self.scheduler is None else self.scheduler.target_activation_rate

    @property
    def target(self) -> float | TargetFn | None:
        """Return the share that the fit holds: a coverage, else the schedule's rate, else the callback's."""
        if self.target_coverage is not None:
            return self.target_coverage
        return self.target_activation_rate if self.scheduled_rate is None else self.scheduled_rate

    def schedule_of(self, trainer: pl.Trainer) -> Schedule:
        """Return the schedule that a run keeps."""
        return Schedule() if self.scheduler is None else self.scheduler.schedule_of(trainer)

    def selector(self, rank: int) -> SampleSelector:
        """Make the selector of this fit."""
        rate = self.target_activation_rate if self.scheduled_rate is None else self.scheduled_rate
        coverage = self.target_coverage
        # The hard gates have no keep-probabilities, and with them always weight 1.
        soft: Weighting = self.weighting or ("none" if MODE_FACTS[self.mode].plans_epochs else "sqrt")
        return SampleSelector(
            # In place of a function, until it is asked.
            target_activation_rate=1.0 if callable(rate) else rate,
            target_coverage=1.0 if callable(coverage) else coverage,
            gate=self.gate,
            weighting=soft if self.gate == "soft" else "none",
            controller=self.controller,
            min_selected=self.min_selected,
            trim=self.trim,
            class_floor=self.samples.class_floor,
            seed=self.seed,
            # Processes that plan one epoch together must draw alike; within batches each draws for itself.
            rank=0 if MODE_FACTS[self.mode].plans_epochs and not self.samples.own_parts else rank,
        )

    @property
    def rule(self) -> dict[str, str]:
        """Name what is selected by, for a checkpoint."""
        score = self.significance if isinstance(self.significance, str) else "callable"
        target = "activation rate" if self.target_coverage is None else "coverage"
        return {"mode": self.mode, "gate": self.gate, "significance": score, "target": target}
