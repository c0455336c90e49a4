"""The table's numbers: what a run reached and spent, and the dense run it is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_ast.report.derive import (
    accuracy,
    activation_rate_when_sparse,
    elapsed_joules,
    elapsed_seconds,
    is_dense,
    last_epoch,
)
from lightning_ast.report.series import Run

__all__ = ["Summary", "reference", "summarize"]


@dataclass(frozen=True)
class Summary:
    """One row of the table: what is known of the whole run. None is what the log does not tell."""

    name: str
    dense: bool  # whether every logged step trained on all samples
    mode: str | None
    epochs: int | None
    steps: int  # the last step logged
    final_accuracy: float | None  # of the last epoch that has one, in [0, 1]
    best_accuracy: float | None  # of all epochs, in [0, 1]
    activation_rate: float | None  # the mean of the sparse steps, in [0, 1]
    savings: Mapping[str, float | None]  # shares by what was saved: at most 1, negative where it cost more
    seconds: float | None
    seconds_measured: bool  # by EnergyMonitor; else they are the event file's wall times
    joules: float | None


def summarize(run: Run) -> Summary:
    """Make the row of a run."""
    found = accuracy(run)
    seconds = elapsed_seconds(run)
    joules = elapsed_joules(run)
    last = last_epoch(run)
    saved = {name: run.series(f"ast/savings_{name}") for name in ("samples", "flops", "seconds", "joules")}
    return Summary(
        name=run.name,
        dense=is_dense(run),
        mode=run.mode,
        epochs=None if last is None else last + 1,
        steps=max((int(series.steps[-1]) for series in run.scalars.values()), default=0),
        final_accuracy=None if found is None else float(found[1].values[-1]),
        best_accuracy=None if found is None else float(found[1].values.max()),
        activation_rate=activation_rate_when_sparse(run),
        savings={name: None if series is None else series.closing for name, series in saved.items()},
        seconds=None if seconds is None else float(seconds[0].values[-1]),
        seconds_measured=seconds is not None and seconds[1],
        joules=None if joules is None else float(joules.values[-1]),
    )


def reference(rows: Sequence[Summary]) -> Summary | None:
    """Find the dense run that the others are held against: the longest; None where none is dense, or for one run."""
    dense = [row for row in rows if row.dense and row.epochs is not None]
    if len(rows) < 2 or not dense:
        return None
    return max(dense, key=lambda row: (row.epochs or 0, row.steps))
