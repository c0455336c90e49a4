"""Advice as text: for ``str()``, and for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_ast.advice.predict import Predictions
from lightning_ast.advice.verdict import Verdict, decide
from lightning_ast.words import counted, size_words, time_words

__all__ = ["Advice", "render"]

_HEADER = ("mode", "rate", "step", "of dense", "memory", "run", "of dense")


@dataclass(frozen=True)
class Advice(Predictions):
    """The advice: what was measured, what follows from it, and what to do. ``print`` it."""

    @cached_property
    def verdict(self) -> Verdict:
        """Return the verdict: what to do."""
        return decide(self)

    def __str__(self) -> str:
        """Return the report, in lines of about 120 characters."""
        rows = [_HEADER, *_rows(self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        table = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*_measured(self), "", *table, "", *_conclusion(self)])


def render(advice: Advice, *, file: Any = None) -> None:
    """Write the report for a person; as a table with rich where that is installed.

    Args:
        advice: The advice to show.
        file: The file to write to; None is the standard output.
    """
    out = sys.stdout if file is None else file
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        out.write(f"{advice}\n")
        return
    console = Console(file=out, highlight=False, markup=False, width=None if out.isatty() else 120)
    table = Table(*_HEADER)
    for column in table.columns[1:]:
        column.justify = "right"
    recommended = (advice.verdict.mode, f"{advice.verdict.rate:g}")
    for row in _rows(advice):
        table.add_row(*row, style="bold" if row[:2] == recommended else None)
    for part in (*_measured(advice), table, *_conclusion(advice)):
        console.print(part, soft_wrap=isinstance(part, str))


def _measured(advice: Advice) -> Iterator[str]:
    facts = advice.facts
    run = advice.facts.run
    step = advice.facts.step
    yield (
        f"Measured on {facts.device} in {facts.seconds:.0f} s, {counted(step.cycles, 'round')}: "
        f"{counted(run.epochs, 'epoch')} of {counted(run.batches_per_epoch, 'batch')} of {run.batch_size}."
    )
    workers = counted(facts.loading.workers, "worker")
    yield f"  loading     {time_words(facts.loading.seconds_per_batch)} a batch, {workers}"
    yield f"  dense step  {time_words(step.dense.seconds)} on batches in memory{_phases(advice)}"
    if step.host_share is not None and step.few_samples is not None:
        yield f"  host        {step.host_share:.0%} of a dense step is left with {counted(step.few_samples, 'sample')}"
    if facts.validation is not None:
        share = advice.dense.validation_seconds / advice.dense.run_seconds
        yield (
            f"  validation  {time_words(facts.validation.seconds)} for {counted(facts.validation.batches, 'batch')}, "
            f"{share:.0%} of the dense run"
        )
    if step.memory is not None:
        yield (
            f"  memory      estimated: {size_words(step.memory.static_bytes)} of parameters, gradients and optimizer "
            f"state, {size_words(step.memory.activation_bytes)} saved for the backward"
        )
    yield from facts.notes


def _phases(advice: Advice) -> str:
    phases = advice.facts.step.phases
    if phases is None:
        return ""
    parts = {
        "forward": phases.forward_seconds,
        "backward": phases.backward_seconds,
        "optimizer and rest": phases.rest_seconds,
        "between": phases.gap_seconds,
    }
    whole = sum(parts.values())
    return ": " + ", ".join(f"{name} {part / whole:.0%}" for name, part in parts.items()) if whole else ""


def _rows(advice: Advice) -> Iterator[tuple[str, ...]]:
    masks = [p for p in advice.table if p.mode == "mask"]
    for p in (advice.dense, *masks[:1], *(p for p in advice.table if p.mode != "mask")):
        yield (
            p.mode or "dense",
            "any" if p.mode == "mask" else f"{p.rate:g}",
            time_words(p.step_seconds),
            f"{p.step_seconds / advice.dense.step_seconds:.2f}",
            "-" if p.memory_bytes is None else size_words(p.memory_bytes),
            time_words(p.run_seconds),
            f"{p.run_share:.2f}",
        )


def _conclusion(advice: Advice) -> Iterator[str]:
    verdict = advice.verdict
    run = advice.facts.run
    yield verdict.headline
    yield from (f"- {reason}" for reason in verdict.reasons)
    own = None if run.own_mode is None or run.own_rate is None else advice.at(run.own_mode, run.own_rate)
    if own is not None and own.mode != verdict.mode:
        seconds = time_words(own.run_seconds)
        yield f"Yours, {own.mode!r} at {own.rate:g}: {seconds}, {own.run_share:.0%} of the dense run."
    if verdict.baseline_epochs is not None and verdict.mode is not None:
        yield (
            f"These are seconds, not accuracy. What to beat: dense training for {verdict.baseline_epochs:.1f} epochs, "
            f"which takes as long as {verdict.mode!r} for {run.epochs:g}."
        )
    elif verdict.saving is not None:
        epochs = counted(run.epochs, "epoch")
        yield f"To save time, train densely for fewer than {epochs}: that is what to beat in any case."
