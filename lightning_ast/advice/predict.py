"""The prediction of rates, steps, memory and runs from what was measured: arithmetic alone, no model and no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from lightning_ast.advice.lengths import Lengths, run_lengths, validations
from lightning_ast.advice.measured import CoverageFacts, Curve, Facts, LoadingFacts, RunFacts, StepAt
from lightning_ast.core.gate import NEARLY_ALL, GateName, floor_for, minimum_count, trimmed
from lightning_ast.core.selector import DEFAULT_RATE
from lightning_ast.core.threshold import rate_at_coverage
from lightning_ast.mode_facts import MODES, Mode, cost_share

__all__ = [
    "COVERAGES",
    "RATES",
    "Prediction",
    "Predictions",
    "at_rate",
    "coverage_facts",
    "is_nothing_to_skip",
    "wanted_rates",
    "with_loading",
]

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Activation rates that are predicted."""
COVERAGES = (0.9, 0.95, 0.97, 0.99)
"""Coverages that are predicted."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one mode at one rate, or for dense training.

    Attributes:
        mode: The mode; None is dense training.
        rate: The activation rate in (0, 1].
        coverage: The coverage that needs this rate, or None where the rate itself is held.
        step_seconds: The time of a sparse step, loading and scoring included.
        compute_seconds: The time of a sparse step on a batch in memory, the optimizer's part shared among accumulated
            batches.
        memory_bytes: The peak memory of a sparse step, or None; measured on CUDA, estimated elsewhere.
        run_seconds: The time of the whole run, warmup, cooldown and validation included.
        validation_seconds: The part of that time that is validation.
        run_share: The share of the dense run's seconds.
        batches: The batches of the whole run.
    """

    mode: Mode | None
    rate: float
    coverage: float | None
    step_seconds: float
    compute_seconds: float
    memory_bytes: int | None
    run_seconds: float
    validation_seconds: float
    run_share: float
    batches: int

    @property
    def setting(self) -> str:
        """Name the rate or the coverage that is held."""
        if self.coverage is None:
            return f"{self.rate:g}"
        return f"a coverage of {self.coverage:g} (a rate of {self.rate:.3g} now)"


def coverage_facts(
    scores: Iterable[Tensor], coverages: Sequence[float], gate: GateName, *, trim: float = 0.0
) -> CoverageFacts | None:
    """Find the activation rates that coverages need over all samples of ``(B,)`` scores; None without a finite one."""
    pooled = torch.cat([torch.empty(0), *(each.detach().cpu().float().flatten() for each in scores)])
    pooled = pooled[pooled.isfinite()]
    if pooled.numel() == 0:
        return None
    pooled = trimmed(pooled, trim)
    # the floor is that of the selector of a run, whose least probability stays below its target
    rates = {c: rate_at_coverage(pooled, c, gate, floor=floor_for(c)) for c in coverages}
    return CoverageFacts(pooled.numel(), rates)


def is_nothing_to_skip(coverage: float, rate: float) -> bool:
    """Tell whether a coverage needs about as large a share of the samples, and any would do as well as those chosen."""
    # a coverage of 1 asks for the dense run, whatever the scores
    return coverage < 1 and rate >= NEARLY_ALL * coverage


def at_rate(curve: Curve, rate: float, dense: StepAt | None = None) -> StepAt:
    """Predict a step at another rate than those measured: linear between two neighbours, a dense step at rate 1."""
    points = sorted({p.rate: p for p in [*curve, *([dense] if dense else [])]}.values(), key=lambda p: p.rate)
    # Below the lowest rate a step costs what it does there: what does not shrink with the samples has the upper hand.
    if len(points) == 1 or rate <= points[0].rate:
        return StepAt(rate, points[0].seconds, points[0].peak_bytes)
    low, high = next((pair for pair in pairwise(points) if rate <= pair[1].rate), (points[-2], points[-1]))
    position = (rate - low.rate) / (high.rate - low.rate)

    def between(first: float, second: float) -> float:
        value = first + position * (second - first)
        return max(second, value) if position > 1 else value  # above the highest rate noise must not make it cheaper

    known = low.peak_bytes is not None and high.peak_bytes is not None
    peak = round(between(low.peak_bytes or 0, high.peak_bytes or 0)) if known else None
    return StepAt(rate, between(low.seconds, high.seconds), peak)


def with_loading(compute_seconds: float, loading: LoadingFacts, *, share: float = 1.0) -> float:
    """Add loading a share of a full batch to a step: one after the other without workers, side by side with them."""
    load_seconds = share * loading.seconds_per_batch
    return max(load_seconds, compute_seconds) if loading.workers else load_seconds + compute_seconds


def wanted_rates(run: RunFacts) -> tuple[float, ...]:
    """List the rates that are predicted: :data:`RATES`, and the user's own."""
    return tuple(sorted({*RATES, run.own_rate or DEFAULT_RATE}))


@dataclass(frozen=True)
class Predictions:
    """The predictions that follow from the facts."""

    facts: Facts

    @property
    def rate(self) -> float | None:
        """Return the user's own activation rate, or the one that their coverage needs (None if not known); else 0.4."""
        run = self.facts.run
        return self.rate_of(run.own_coverage) if run.own_coverage is not None else run.own_rate or DEFAULT_RATE

    def rate_of(self, coverage: float) -> float | None:
        """Return the activation rate that a coverage needs; None where it is not known."""
        return None if self.facts.coverage is None else self.facts.coverage.rates.get(coverage)

    @property
    def has_nothing_to_skip(self) -> bool:
        """Tell whether the user's own coverage finds nothing to skip yet."""
        coverage = self.facts.run.own_coverage
        return coverage is not None and self.rate is not None and is_nothing_to_skip(coverage, self.rate)

    @cached_property
    def modes(self) -> tuple[Mode, ...]:
        """Return the modes that can run."""
        return tuple(mode for mode in MODES if mode not in self.facts.step.refused)

    @cached_property
    def dense(self) -> Prediction:
        """Predict dense training."""
        return self._prediction(None, 1.0)

    @cached_property
    def table(self) -> tuple[Prediction, ...]:
        """Predict every mode that can run, at every rate, and at the user's own coverage."""
        coverage = self.facts.run.own_coverage
        covering = () if coverage is None else self.covering(coverage)
        rates = wanted_rates(self.facts.run)

        def of_mode(mode: Mode) -> list[Prediction]:
            found = [self._prediction(mode, rate) for rate in rates if self._is_predicted(mode, self.facts.run)]
            return sorted([*found, *(p for p in covering if p.mode == mode)], key=lambda p: p.rate)

        return tuple(p for mode in self.modes for p in of_mode(mode))

    @cached_property
    def own(self) -> tuple[Prediction, ...]:
        """Predict every mode that can run at the rate, or the coverage, that the user asks for; else at 0.4."""
        coverage = self.facts.run.own_coverage
        return tuple(p for p in self.table if p.coverage == coverage and (coverage or p.rate == self.rate))

    def covering(self, coverage: float) -> tuple[Prediction, ...]:
        """Predict every mode that can run at a coverage; nothing where it is not known which rate that needs."""
        rate = self.rate_of(coverage)
        if rate is None:
            return ()
        modes = (mode for mode in self.modes if self._is_predicted(mode, self._covering_run))
        return tuple(self._prediction(mode, rate, coverage=coverage) for mode in modes)

    @property
    def _covering_run(self) -> RunFacts:
        """Return the run with a coverage, whose number of steps cannot be planned anew."""
        run = self.facts.run
        return replace(run, prune_steps="keep") if run.prune_steps == "replan" else run

    def at(self, mode: str, rate: float) -> Prediction | None:
        """Return the prediction of a mode at a rate of the table; None where the mode, or this rate, is refused."""
        return next((p for p in self.table if (p.mode, p.rate) == (mode, rate)), None)

    def at_coverage(self, mode: str, coverage: float) -> Prediction | None:
        """Return the prediction of a mode at the user's coverage or one of the usual ones; None where it is refused."""
        return next((p for p in self.covering(coverage) if p.mode == mode), None)

    def _is_predicted(self, mode: Mode, run: RunFacts) -> bool:
        """Tell whether a mode can be predicted; the smaller batches of ``prune`` may not be measured."""
        return mode != "prune" or run.prune_steps != "keep" or self.facts.step.parts is not None

    @property
    def compute_seconds(self) -> float:
        """Return the time of a dense step in memory, the optimizer's part shared among accumulated batches."""
        return self._accumulated(self.facts.step.dense.seconds)

    def _accumulated(self, seconds: float) -> float:
        phases = self.facts.step.phases
        factors = self.facts.run.accumulate
        factor = factors[max(factors)]
        return seconds if phases is None else seconds - min(seconds, phases.rest_seconds) * (1 - 1 / factor)

    @property
    def _scored(self) -> StepAt:
        dense = self.facts.step.dense
        return StepAt(1.0, dense.seconds + (self.facts.step.selection_seconds or 0.0), dense.peak_bytes)

    def _sparse_step(self, mode: Mode, rate: float, *, covers: bool) -> StepAt:
        """Predict a step of a mode on batches in memory; in ``prune`` the rate is the share of a full batch in each."""
        step = self.facts.step
        if mode == "prune" and rate < 1 and step.parts is not None:
            part = at_rate(step.parts, rate, step.dense)
            return replace(self._scored, seconds=part.seconds + self._scored.seconds - step.dense.seconds)
        # where a coverage is held, a run trains on whole batches as soon as a selection costs more than it saves
        if covers and mode == "subset" and cost_share(mode, rate) >= 1:
            return step.dense
        if mode not in step.curves or (covers and rate >= NEARLY_ALL):
            return self._scored
        size = self.facts.run.batch_size
        rate = max(rate, minimum_count(size, self.facts.run.min_selected) / size)
        # `partial` that keeps all of a batch is a dense step that scores; `subset` has a second forward even there
        return at_rate(step.curves[mode], rate, self._scored if mode == "partial" else None)

    def _memory(self, mode: Mode | None, rate: float, measured: int | None) -> int | None:
        estimate = self.facts.step.memory
        if measured is not None or estimate is None:
            return measured
        return round(estimate.static_bytes + estimate.activation_bytes * (rate if mode == "subset" else 1.0))

    def _prediction(self, mode: Mode | None, rate: float, *, coverage: float | None = None) -> Prediction:
        run = self.facts.run if coverage is None else self._covering_run
        is_whole = coverage is not None and rate >= NEARLY_ALL
        lengths = run_lengths(run, mode, 1.0 if is_whole else rate)
        step = self.facts.step.dense
        if mode is not None:
            share = lengths.sparse_share if mode == "prune" else rate
            step = self._sparse_step(mode, share, covers=coverage is not None)
        compute = self._accumulated(step.seconds)
        step_seconds = with_loading(compute, self.facts.loading, share=lengths.sparse_share)
        training = self._training_seconds(lengths, step_seconds)
        validation = 0.0
        if (due := self.facts.validation) is not None:
            validation = due.seconds * validations(due, run, lengths, training)
        return Prediction(
            mode=mode,
            rate=rate,
            coverage=coverage,
            step_seconds=step_seconds,
            compute_seconds=compute,
            memory_bytes=self._memory(mode, rate, step.peak_bytes),
            run_seconds=training + validation,
            validation_seconds=validation,
            run_share=1.0 if mode is None else (training + validation) / self.dense.run_seconds,
            batches=math.ceil(lengths.batches - 1e-9),
        )

    def _training_seconds(self, lengths: Lengths, step_seconds: float) -> float:
        loading = self.facts.loading
        plain = with_loading(self.compute_seconds, loading)
        scored = with_loading(self._accumulated(self._scored.seconds), loading)
        training = lengths.unscored_batches * plain + (lengths.dense_batches - lengths.unscored_batches) * scored
        training += lengths.sparse_batches * step_seconds
        return training + (lengths.epochs if loading.restarts else 1) * loading.start_seconds
