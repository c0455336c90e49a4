"""The results of a run, epoch by epoch: loss, accuracy, activation, time. Read for the line and the summary."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_ast.core.ledger import Ledger
from lightning_ast.lightning_internals.fit_loop import run_length
from lightning_ast.monitoring.text import best_flops_savings, format_seconds, seconds_left
from lightning_ast.schedule import Stage
from lightning_ast.selection.session import Session

__all__ = ["RunProgress", "epoch_details", "names_accuracy", "selection_summary"]


@dataclass
class RunProgress:
    """The sums of steps and epochs, all of them primitives: a checkpoint holds them."""

    accuracies: dict[int, float] = field(default_factory=dict)  # in [0, 1], by epoch from 0
    seconds: dict[Stage, list[float]] = field(default_factory=dict)  # of each finished epoch
    monitoring_seconds: float = 0.0  # while training went on
    stage: Stage = "warmup"
    validated: bool = False  # since the last epoch's line
    _loss_sum: Tensor | None = None  # on its device: reading it in each step would wait for the step
    _steps: int = 0
    _before: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # what _totals gave at the start of the epoch
    _began: float = 0.0
    _carried: float = 0.0  # seconds of the running epoch before the run was resumed in it
    last_seconds: float = 0.0  # of the epoch that was finished last, validation included

    @property
    def epochs(self) -> int:
        """Count the finished epochs."""
        return sum(len(each) for each in self.seconds.values())

    @property
    def begun(self) -> bool:
        """Tell whether the run has begun, here or before it was resumed."""
        return bool(self._began or self._carried or self.seconds)

    @property
    def finished_seconds(self) -> float:
        """Return the seconds of the finished epochs."""
        return sum(sum(each) for each in self.seconds.values())

    @property
    def elapsed(self) -> float:
        """Return the seconds of the finished epochs and of the running one."""
        return self.finished_seconds + self._carried + time.perf_counter() - self._began

    def begin(self) -> None:
        """Start the time."""
        self._began = time.perf_counter()

    def start_epoch(self, ledger: Ledger | None) -> None:
        """Start an epoch with its first batch: the hook for its start is not called after every resume."""
        self._loss_sum = None
        self._steps = 0
        self._before = _totals(ledger)

    def add_loss(self, outputs: Any) -> None:
        """Add what ``training_step`` returned, without waiting for the device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach().float()
            self._loss_sum = loss if self._loss_sum is None else self._loss_sum.to(loss.device) + loss
            self._steps += 1

    def finish_epoch(self, trainer: pl.Trainer, session: Session | None, accuracy: float | None) -> dict[str, Any]:
        """Return the arguments of :func:`~lightning_ast.monitoring.text.format_epoch` for the epoch's line."""
        ledger = None if session is None else session.ledger
        stage = self.stage
        self.validated = False
        now = time.perf_counter()
        self.last_seconds = self._carried + now - self._began
        self.seconds.setdefault(stage, []).append(self.last_seconds)
        self._began = now
        self._carried = 0.0
        if accuracy is not None:
            self.accuracies[trainer.current_epoch] = accuracy
        # Differences of the run's totals: a ledger that was restored in mid-epoch needs no sums of its own.
        offered, selected, spent, dense = (now - then for now, then in zip(_totals(ledger), self._before, strict=True))
        # Lightning divides the step's output by the accumulation; the line shows the user's own loss
        scale = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
        max_epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        stages_ahead = _stages_ahead(trainer, stage, session)
        left = None if stages_ahead is None else seconds_left(self.seconds, stages_ahead)
        loss = None if self._loss_sum is None else float(self._loss_sum) * scale / self._steps
        self.start_epoch(ledger)  # the next one's first batch may be skipped
        return {
            "epoch": trainer.current_epoch,
            "max_epochs": max_epochs,
            "loss": loss,
            "accuracy": accuracy,
            "activation_rate": selected / offered if offered else 1.0,
            "flops_savings": 1 - spent / dense if dense else None,
            "eta_seconds": left or None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, so that an epoch that was interrupted in its middle is summed up whole."""
        return {
            "loss_sum": None if self._loss_sum is None else float(self._loss_sum),
            "steps": self._steps,
            "before": list(self._before),
            "accuracies": dict(self.accuracies),
            "seconds": {stage: list(each) for stage, each in self.seconds.items()},
            "running": self._carried + (time.perf_counter() - self._began if self._began else 0.0),
            "monitoring": self.monitoring_seconds,
            "stage": self.stage,
            "validated": int(self.validated),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RunProgress:
        """Make what :meth:`state_dict` was called on."""
        return cls(
            dict(state["accuracies"]),
            {stage: list(each) for stage, each in state["seconds"].items()},
            state["monitoring"],
            state["stage"],
            bool(state["validated"]),
            None if state["loss_sum"] is None else torch.tensor(state["loss_sum"]),
            state["steps"],
            tuple(state["before"]),
            _carried=state["running"],
        )


def _totals(ledger: Ledger | None) -> tuple[float, ...]:
    """Return the samples offered and selected, the FLOPs spent and those of a dense run; zeros without selection."""
    if ledger is None:
        return 0.0, 0.0, 0.0, 0.0
    return ledger.offered, ledger.selected, ledger.spent_flops() or 0.0, ledger.dense_flops() or 0.0


def _stages_ahead(trainer: pl.Trainer, stage: Stage, session: Session | None) -> list[Stage] | None:
    """List the stages of the epochs that are still to come; a run without selection keeps the stage that it has."""
    if session is not None:
        return session.mode.stages_ahead(trainer.current_epoch + 1)
    length = run_length(trainer).epochs
    return None if length is None else [stage] * (math.ceil(length) - trainer.current_epoch - 1)


def names_accuracy(name: str) -> bool:
    """Tell whether a metric's name is that of a validation accuracy."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return bool(words & {"val", "valid", "validation"}) and bool(words & {"acc", "accuracy"})


def epoch_details(
    names: Iterable[str], metrics: Mapping[str, Tensor], *, seconds: float | None, device: torch.device
) -> list[str]:
    """Write further fields of an epoch's line: metrics that are logged, and the time (None: no time and no memory)."""
    fields = [f"{name}: {float(metrics[name]):.4g}" for name in names if name in metrics]
    if seconds is not None:
        fields.append(f"Time: {format_seconds(seconds)}")
        if device.type == "cuda":
            fields.append(f"GPU: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    return fields


def selection_summary(session: Session | None, *, measures_joules: bool) -> dict[str, Any]:
    """Return the fields of a :class:`~lightning_ast.monitoring.text.RunSummary` that are about the selection."""
    if session is None:
        return {}
    ledger = session.ledger
    sparse = ledger.stages.get("sparse")
    savings = ledger.savings()
    selector = session.selector
    rate = sparse.selected / sparse.offered if sparse is not None and sparse.offered else None
    selected = rate is not None and (rate < 1 or selector.selects)
    if savings["joules"] is None and not measures_joules:
        del savings["joules"]
    return {
        "mode": session.mode.name,
        "activation_rate": ledger.activation_rate,
        "sparse_rate": rate if selected else None,
        "target": selector.target,
        "holds": "rate" if selector.target_coverage is None else "coverage",
        "savings": savings,
        "best_savings": best_flops_savings(ledger, session.mode.name) if selected else None,
        "quarantined": len(session.quarantine.samples),
    }
