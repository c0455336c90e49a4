"""The contents of a run's log: series over training steps, histograms, and the run around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Histogram", "Ints", "Run", "Series", "Source", "keep_latest", "rebin"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Source = Literal["TensorBoard", "CSV", "TensorBoard and CSV"]


@dataclass(frozen=True, eq=False)
class Series:
    """A scalar over the steps of a run."""

    steps: Ints  # (n,), strictly increasing, from 0
    values: Floats  # (n,); NaN where NaN was logged
    # (n,), since the run began, without the breaks of a resumed run; None where the log has no times (CSV).
    clock_seconds: Floats | None = None

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[float], clock_seconds: Sequence[float] | None = None) -> Series:
        """Make a series from points in the order they were logged; of steps logged twice, the later counts."""
        kept = keep_latest(steps)
        clock = None if clock_seconds is None else np.asarray(clock_seconds, dtype=np.float64)[kept]
        return cls(np.asarray(steps, dtype=np.int64)[kept], np.asarray(values, dtype=np.float64)[kept], clock)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float | None:
        """Return the last finite value, or None."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if finite.size else None

    @property
    def closing(self) -> float | None:
        """Return the value that the series ends with, or None where that is not known any more (logged as NaN)."""
        return float(self.values[-1]) if self.values.size and np.isfinite(self.values[-1]) else None


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts between edges, as they were logged at a step."""

    step: int
    edges: Floats  # (k + 1,), increasing
    counts: Floats  # (k,), not negative


@dataclass(frozen=True, eq=False)
class Run:
    """One run, as its log tells it.

    Attributes:
        name: A name that tells it from the other runs.
        folder: The folder of its log.
        source: The kind of log.
        scalars: The series by tag.
        histograms: The last histogram of each tag.
        mode: The mode, where a configuration of ``lightning-ast fit`` stands beside the log; else None.
    """

    name: str
    folder: Path
    source: Source
    scalars: Mapping[str, Series]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    mode: str | None = None

    def series(self, tag: str | None) -> Series | None:
        """Return the series of a tag, or None where it has no finite value."""
        found = None if tag is None else self.scalars.get(tag)
        return None if found is None or found.last is None else found


def keep_latest(steps: Sequence[int]) -> list[int]:
    """Find the positions of the steps that count: a run that goes back to an earlier one undoes what came after it."""
    kept: list[int] = []
    for position, step in enumerate(steps):
        while kept and steps[kept[-1]] >= step:
            kept.pop()
        kept.append(position)
    return kept


def rebin(histogram: Histogram, edges: Floats) -> Floats:
    """Count ``(m,)`` between other edges ``(m + 1,)``, each old count spread evenly over its bucket."""
    # a cumulative count can be read off between the old edges, and no count gets lost however the new ones lie
    cumulative = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    if histogram.edges[0] == histogram.edges[-1]:  # every value is the same
        return np.histogram(histogram.edges[:1], bins=edges, weights=cumulative[-1:])[0].astype(np.float64)
    out: Floats = np.diff(np.interp(edges, histogram.edges, cumulative))
    return out
