"""Advice as text: for ``str()``, and for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TextIO

from lightning_ast.advice.predict import Prediction, Predictions, is_nothing_to_skip
from lightning_ast.advice.verdict import Verdict, decide
from lightning_ast.words import aligned, counted, size_words, time_words

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
        parts = (_measured(self), _table(self), _coverage(self), _conclusion(self))
        return "\n".join(chain.from_iterable(parts))


def render(advice: Advice, *, file: TextIO | None = None) -> None:
    """Write the report for a person.

    Args:
        advice: The advice to show.
        file: The file to write to; None is the standard output.
    """
    (sys.stdout if file is None else file).write(f"{advice}\n")


def _measured(advice: Advice) -> Iterator[str]:
    facts = advice.facts
    run = facts.run
    step = facts.step
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


def _table(advice: Advice) -> Iterator[str]:
    masks = [p for p in advice.table if p.mode == "mask"]
    shown = [advice.dense, *masks[:1], *(p for p in advice.table if p.mode != "mask")]
    yield f"\n{aligned([_HEADER, *(_cells(advice, p) for p in shown)])}\n"


def _cells(advice: Advice, p: Prediction) -> tuple[str, ...]:
    rate = f"{p.rate:g}" if p.coverage is None else f"{p.rate:.3g} (coverage {p.coverage:g})"
    return (
        p.mode or "dense",
        "any" if p.mode == "mask" else rate,
        time_words(p.step_seconds),
        f"{p.step_seconds / advice.dense.step_seconds:.2f}",
        "-" if p.memory_bytes is None else size_words(p.memory_bytes),
        time_words(p.run_seconds),
        f"{p.run_share:.2f}",
    )


def _coverage(advice: Advice) -> Iterator[str]:
    facts = advice.facts.coverage
    if facts is None:
        why = "no sample had a finite significance" if advice.modes else "no mode can run that would score them"
        yield f"What a target_coverage needs of the samples is not known: {why}."
        return
    yield (
        "What a target_coverage needs of the module as it is now, by the significance of "
        f"{counted(facts.samples, 'sample')} (a step, its share of a dense step / the run's share of the dense run):"
    )
    rows: list[tuple[str, ...]] = [("coverage", "rate", *advice.modes)]
    for coverage, rate in facts.rates.items():
        covering = {p.mode: p for p in advice.covering(coverage)}
        cells = (_covering_cell(advice, covering.get(mode)) for mode in advice.modes)
        rows.append((f"{coverage:g}", f"{rate:.3g}", *cells))
    yield f"\n{aligned(rows)}\n"
    flat = [f"{coverage:g}" for coverage, rate in facts.rates.items() if is_nothing_to_skip(coverage, rate)]
    if flat:
        yield (
            f"At a coverage of {', '.join(flat)} there is nothing to skip yet: the samples are so much alike that it "
            "needs about the same share of them. The rate falls as the module learns: for a look at later epochs, pass "
            "the module of a trained checkpoint."
        )


def _covering_cell(advice: Advice, p: Prediction | None) -> str:
    if p is None:
        return "not measured" if advice.facts.step.parts is None else "-"
    share = p.step_seconds / advice.dense.step_seconds
    return f"{time_words(p.step_seconds)}, {share:.2f} / {p.run_share:.2f}"


def _conclusion(advice: Advice) -> Iterator[str]:
    verdict = advice.verdict
    run = advice.facts.run
    yield verdict.headline
    yield from (f"- {reason}" for reason in verdict.reasons)
    own = next((p for p in advice.own if p.mode == run.own_mode), None)
    if own is not None and own.mode != verdict.mode:
        seconds = time_words(own.run_seconds)
        yield f"Yours, {own.mode!r} at {own.setting}: {seconds}, {own.run_share:.0%} of the dense run."
    if verdict.baseline_epochs is not None and verdict.mode is not None:
        yield (
            f"These are seconds, not accuracy. What to beat: dense training for {verdict.baseline_epochs:.1f} epochs, "
            f"which takes as long as {verdict.mode!r} for {run.epochs:g}."
        )
    elif verdict.saving is not None and not advice.has_nothing_to_skip:
        epochs = counted(run.epochs, "epoch")
        yield f"To save time, train densely for fewer than {epochs}: that is what to beat in any case."
