"""The costs of the running epoch: the joules of the meters, the seconds of the sections, the stage they belong to."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ast.energy.energy_ledger import Activity, EnergyBook
from lightning_ast.energy.meters import EnergyKind
from lightning_ast.energy.step_sections import Clock, StepSections
from lightning_ast.schedule import STAGE_CODES, Stage
from lightning_ast.selection.accounting import SETTLE_STEPS
from lightning_ast.selection.fit_parts import Watcher
from lightning_ast.selection.session import Session
from lightning_ast.selection.step_state import StepState

__all__ = ["EpochCosts", "OpenEpoch"]


@dataclass(frozen=True)
class EpochCosts:
    """The costs of one epoch.

    Seconds are this process's wall time, those of the three sections on CUDA the device's. Joules are those of all
    processes, validation included, and None where they are not measured.

    Attributes:
        epoch: The number of the epoch, from 0.
        epoch_seconds: The seconds of the whole epoch, the sum of the five that follow.
        loading_seconds: The time from the end of a batch to the start of the next: fetching, transfer, and what
            Lightning does in between. With workers, or on CUDA, what was waited for.
        scoring_seconds: The scoring forward of mode ``subset``; the other modes score from the step's own losses.
        forward_backward_seconds: The time from there to the end of the last backward.
        validation_seconds: The validation within the epoch.
        other_seconds: The rest: optimizer, callbacks, loggers, checkpoints.
        gpu_joules: The joules of the GPUs that were trained on.
        cpu_joules: The joules of the machines' CPUs, whatever else ran on them.
    """

    epoch: int
    epoch_seconds: float
    loading_seconds: float
    scoring_seconds: float
    forward_backward_seconds: float
    validation_seconds: float
    other_seconds: float
    gpu_joules: float | None
    cpu_joules: float | None

    @property
    def epoch_joules(self) -> float | None:
        """Return the joules of GPUs and CPUs together, where either is measured."""
        known = [joules for joules in (self.gpu_joules, self.cpu_joules) if joules is not None]
        return sum(known) if known else None


class OpenEpoch(Watcher):
    """The epoch that is being measured; its session is that of the selection callback, None where nobody selects."""

    def __init__(self, trainer: pl.Trainer, book: EnergyBook, clock: Clock, session: Session | None) -> None:
        self._book = book
        self._clock = clock
        self.number = trainer.current_epoch
        self.sections = StepSections(clock)
        self._ledger = None if session is None else session.ledger
        if session is not None:
            session.watchers.append(self)
        self._stage: Stage = "warmup"
        self._steps = dict.fromkeys(STAGE_CODES, 0)
        # what was measured in all epochs so far; empty where that changed, None before the first
        self._kinds: set[EnergyKind] | None = None
        self._began = self._validation_began = time.perf_counter()
        self._validates = self._pauses = False
        self._seconds = self._validation_seconds = 0.0

    @property
    def _offered(self) -> int:
        return 0 if self._ledger is None else self._ledger.offered

    @property
    def savings(self) -> float | None:
        """Return the share of the joules that was saved so far, or None."""
        return None if self._ledger is None else self._ledger.savings()["joules"]

    @property
    def _activity(self) -> Activity:
        return self._stage if self._steps[self._stage] >= SETTLE_STEPS else "settling"

    def begin(self, carried: dict[str, Any]) -> None:
        """Measure from now on, besides what an interrupted run had cost."""
        self._book.begin(self._offered)
        if carried:
            self.number = carried["epoch"]
            self._resume(carried["book"])
            self.sections.seconds = dict(carried["sections"])
            self._seconds, self._validation_seconds = carried["seconds"]
        self._began = time.perf_counter()
        self.sections.restart()

    def _resume(self, book: dict[str, Any]) -> None:
        if self._ledger is not None and book["meters"] != self._book.measured and self._ledger.forget_joules():
            rank_zero_warn(
                f"lightning-ast: the interrupted run measured {book['meters'] or 'no'} energy and this one "
                f"{self._book.measured or 'none'}: there are no ast/savings_joules."
            )
            self._kinds = set()
        self._book.load_state_dict(book)
        if self._offered == 0 and any(self._book.offered.values()):
            self._book.offered.clear()  # the checkpoint had no state of the selection: its ledger begins anew
            self._kinds = set()

    def start_batch(self) -> None:
        """Begin a step with its loaded batch; where something else came before it, training begins here."""
        if self._pauses:
            self._pauses = False
            self._book.read(self._activity, offered=self._offered)
        self.sections.start_batch()

    def start_stage(self, stage: Stage) -> None:
        """Attribute what was counted so far to the stage before, and begin this one."""
        self._stage = stage
        self._book.read(self._activity, offered=self._offered)

    def scoring(self) -> AbstractContextManager[None]:
        """Time a section of the step: the scoring forward."""
        return self.sections.scoring()

    def finish_batch(self, step: StepState) -> None:
        """Count the step."""
        self._steps[self._stage] += 1
        # The first steps of a stage compile, count FLOPs and warm caches: their joules are not the stage's. The device
        # is waited for, or what it still has to do of these steps would be counted as the stage's.
        if self._steps[self._stage] == SETTLE_STEPS:
            self._clock.wait()
            self._book.read(self._activity, offered=self._offered)

    # the selection calls what stands above, and the monitor what follows

    def read_if_due(self) -> None:
        """Read counters that would come round."""
        if self._book.due:
            self._book.read(offered=self._offered)

    def start_validation(self) -> None:
        """Count as validation from here on."""
        self._clock.wait()
        self._book.read("validation", offered=self._offered)
        self._validation_began = time.perf_counter()
        self._validates = True

    def end_validation(self) -> None:
        """Count as training from here on."""
        if not self._validates:
            return
        self._clock.wait()
        self._pause()
        self._validation_seconds += time.perf_counter() - self._validation_began
        self._validates = False
        self.sections.restart()

    def _pause(self) -> None:
        """Let what comes now, up to the next batch, stand for no stage."""
        self._book.read("settling", offered=self._offered)
        self._pauses = True

    def close(self) -> EpochCosts:
        """Return the costs of the epoch over all processes; begin the next one."""
        sections = self.sections.take()
        self._pause()
        joules = self._book.close()
        self._record(joules)
        now = time.perf_counter()
        seconds = self._seconds + now - self._began
        validation = self._validation_seconds
        self._began = now
        self._seconds = 0.0
        self._validation_seconds = 0.0
        self.number += 1
        known = {f"{name}_seconds": sections.get(name, 0.0) for name in ("loading", "scoring", "forward_backward")}
        other = seconds - validation - sum(known.values())
        spent = {kind: sum(by_activity.values()) for kind, by_activity in joules.items()}
        return EpochCosts(
            self.number - 1, seconds, **known, validation_seconds=validation, other_seconds=other,
            gpu_joules=spent.get("gpu"), cpu_joules=spent.get("cpu"),
        )  # fmt: skip

    def _record(self, joules: dict[EnergyKind, dict[Activity, float]]) -> None:
        """Record the costs of the steps that stand for their stage, as long as the same hardware is measured."""
        offered = self._book.offered
        self._book.offered = {}
        self._kinds = set(joules) if self._kinds is None else self._kinds
        if self._ledger is None or not self._kinds:
            return
        # joules of a sample with a GPU's counter and without it cannot be compared
        if self._kinds != set(joules):
            self._ledger.forget_joules()
            self._kinds = set()
            return
        for stage in STAGE_CODES:
            if offered.get(stage):
                spent = sum(by_activity[stage] for by_activity in joules.values())
                self._ledger.record_joules(stage, joules=spent, offered=offered[stage])

    def state_dict(self) -> dict[str, Any]:
        """Return the costs of the epoch so far."""
        self.sections.settle()
        self._book.read(offered=self._offered)
        now = time.perf_counter()
        validation = self._validation_seconds + (now - self._validation_began if self._validates else 0.0)
        return {
            "epoch": self.number,
            "book": self._book.state_dict(),
            "sections": dict(self.sections.seconds),
            "seconds": [self._seconds + now - self._began, validation],
        }
