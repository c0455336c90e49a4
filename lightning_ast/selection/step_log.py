"""The scalars of the selection callback: those of a step, and at the end those that the loggers lack."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ast.lightning_internals.logger_connector import (
    batches_completed,
    forget_step_values,
    last_logged,
    logs_this_step,
    remove_shown,
    running_step,
    show,
    will_write,
    write,
)
from lightning_ast.schedule import STAGE_CODES, Stage
from lightning_ast.selection.fit_parts import FitParts

__all__ = ["BAR_NAMES", "StepLog"]

BAR_NAMES = frozenset({"act", "flops_saved", "samples_skipped"})  # what the progress bar shows
_JOULES = "ast/savings_joules"  # logged by EnergyMonitor at the end of each epoch
# The last value of savings that were logged and are not known any more, which else would seem to hold.
_NOT_KNOWN = math.nan


@dataclass
class _Batch:
    """The last batch that was trained on."""

    step: int  # on the x-axis of the loggers
    epoch: int
    stage: Stage
    completed: int  # batches, before it
    activation_rate: float | None
    coverage: float | None
    activation_rate_ema: float | None
    threshold: Tensor | None  # of the last sparse batch up to it; on the device, where reading it would wait
    written: dict[str, float] | None = None  # its values, where Lightning writes them once the batch is completed


class StepLog:
    """Logs the steps of a fit, by the values of this process, and at its end what the loggers were not given."""

    def __init__(self, parts: FitParts) -> None:
        self._parts = parts
        self._trainer = parts.trainer
        self._last: _Batch | None = None
        self._fresh = False
        self._threshold: Tensor | None = None
        self._logged: set[str] = set()

    def finish_batch(
        self, batch_idx: int, stage: Stage, *, activation_rate: float | None, coverage: float | None
    ) -> None:
        """Log a batch that was trained on, where it is wanted."""
        self.settle()
        trainer = self._trainer
        selector = self._parts.selector
        batch = _Batch(
            running_step(trainer),
            trainer.current_epoch,
            stage,
            batches_completed(trainer),
            activation_rate,
            coverage,
            selector.controller.activation_rate_ema,
            selector.last_threshold,
        )
        if self._last is None and stage != "sparse":
            self._threshold = selector.last_threshold  # of a resumed run, which logged it before it was interrupted
        if self._is_wanted(batch_idx):
            values = self._values(batch)
            self._log(values, batch)
            batch.written = values if will_write(trainer) else None
        begins = batch.step == 0 if self._last is None else stage != self._last.stage
        if begins and not will_write(trainer):  # a stage may be shorter than the loggers' interval
            write(trainer, {"ast/stage": float(STAGE_CODES[stage])}, step=batch.step, epoch=batch.epoch)
        self._last = batch

    def settle(self) -> dict[str, float]:
        """Return what Lightning wrote of the last batch, and keep it from being written again."""
        if self._fresh:
            forget_step_values(self._trainer, self._logged)
            self._fresh = False
        batch = self._last
        if batch is None or batch.written is None or batches_completed(self._trainer) == batch.completed:
            return {}
        if batch.stage == "sparse":
            self._threshold = batch.threshold
        return batch.written

    def _is_wanted(self, batch_idx: int) -> bool:
        """Tell whether a step is logged: where the loggers write, and where an epoch or the run begins or ends."""
        # The first step makes the names known to callbacks that monitor them; the last one is what the bar shows at
        # last.
        trainer = self._trainer
        ends = trainer.is_last_batch or 0 < trainer.max_steps <= trainer.global_step
        return batch_idx == 0 or ends or logs_this_step(trainer)

    def _log(self, values: dict[str, float], batch: _Batch) -> None:
        """Log tensors on the host: a number would be copied to the device, and waited for."""
        logged = {name: torch.tensor(value) for name, value in values.items()}
        if batch.stage == "sparse" and batch.threshold is not None:
            logged["ast/threshold"] = batch.threshold.float()
        self._parts.module.log_dict(logged, on_step=True, on_epoch=False, batch_size=1)
        bar = _bar(values)
        remove_shown(self._trainer, BAR_NAMES - bar.keys())
        shown = {name: torch.tensor(value) for name, value in bar.items()}
        self._parts.module.log_dict(shown, on_step=True, on_epoch=False, batch_size=1, prog_bar=True, logger=False)
        self._logged.update(logged, shown)
        self._fresh = True

    def _values(self, batch: _Batch) -> dict[str, float]:
        """Return what the host knows of the run so far, by logged name; what is not known is left out."""
        savings = self._parts.ledger.savings()
        selector = self._parts.selector
        quarantine = self._parts.quarantine
        held = "activation_rate" if selector.target_coverage is None else "coverage"
        values = {
            "ast/activation_rate": batch.activation_rate,
            "ast/activation_rate_ema": batch.activation_rate_ema,
            "ast/coverage": batch.coverage,
            f"ast/target_{held}": float(selector.target) if batch.stage == "sparse" else 1.0,
            "ast/stage": float(STAGE_CODES[batch.stage]),
            "ast/quarantined": float(quarantine.count) if quarantine.samples else None,
            **{f"ast/savings_{name}": savings[name] for name in ("samples", "flops", "seconds")},
        }
        return {name: value for name, value in values.items() if value is not None}

    def finish_epoch(self) -> None:
        """Show the values of the epoch's last batch: a stop in its midst is known only behind that batch."""
        if self._last is not None:
            values = self._values(self._last)
            show(self._trainer, values, bar=_bar(values))

    def close(self) -> None:
        """Write the last value of every series that the loggers do not have yet; later calls write nothing."""
        # Loggers get every `log_every_n_steps`-th step, but savings change with every one: the last that were logged
        # would be those of a step before the end. No process waits for another, so this also works in a run that fails.
        written = self.settle()
        batch = self._last
        self._last = None
        if batch is None:
            return
        values = self._values(batch) | self._joules()
        gone = {name for name in self._logged - values.keys() if name.startswith("ast/savings_")}
        values |= dict.fromkeys(gone, _NOT_KNOWN)
        if batch.threshold is not None and batch.threshold is not self._threshold:
            values["ast/threshold"] = float(batch.threshold)
        show(self._trainer, values, bar=_bar(values))
        lacking = {name: value for name, value in values.items() if written.get(name) != value}
        write(self._trainer, lacking, step=batch.step, epoch=batch.epoch)

    def _joules(self) -> dict[str, float]:
        """Return the share of the joules that was saved, where it is not what was logged at the end of an epoch."""
        joules = self._parts.ledger.savings()["joules"]
        logged = last_logged(self._trainer, _JOULES)
        if joules is None:
            return {} if logged is None else {_JOULES: _NOT_KNOWN}
        return {} if logged is not None and math.isclose(joules, logged, rel_tol=1e-6) else {_JOULES: joules}


def _bar(values: dict[str, float]) -> dict[str, float]:
    """Return what the progress bar shows: the activation rate, and a share that is named by what was saved."""
    shown = {"act": values.get("ast/activation_rate")}
    flops = values.get("ast/savings_flops", _NOT_KNOWN)
    if math.isnan(flops):
        shown["samples_skipped"] = values.get("ast/savings_samples")
    else:
        shown["flops_saved"] = flops
    return {name: value for name, value in shown.items() if value is not None}
