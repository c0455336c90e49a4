"""The contents of a run's log: series over training steps, histograms, and the run around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Histogram", "Ints", "Points", "Run", "Series", "Source", "rebin"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Points = dict[str, list[tuple[int, float]]]  # steps and values as they were logged, by tag
Source = Literal["TensorBoard", "CSV", "TensorBoard and CSV"]


@dataclass(frozen=True, eq=False)
class Series:
    """A scalar over the steps of a run."""

    steps: Ints  # (n,), strictly increasing, from 0
    values: Floats  # (n,); NaN where NaN was logged

    @classmethod
    def of(cls, points: Sequence[tuple[int, float]]) -> Series:
        """Make a series from steps and values in the order they were logged.

        A run that goes back to an earlier step undoes what came after it.
        """
        kept: list[tuple[int, float]] = []
        for step, value in points:
            while kept and kept[-1][0] >= step:
                kept.pop()
            kept.append((step, value))
        steps, values = zip(*kept, strict=True) if kept else ((), ())
        return cls(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))

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


def rebin(histogram: Histogram, edges: Floats) -> Floats:
    """Count ``(m,)`` between other edges ``(m + 1,)``, each old count spread evenly over its bucket."""
    # a cumulative count can be read off between the old edges, and no count gets lost however the new ones lie
    cumulative = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    if histogram.edges[0] == histogram.edges[-1]:  # every value is the same
        return np.histogram(histogram.edges[:1], bins=edges, weights=cumulative[-1:])[0].astype(np.float64)
    out: Floats = np.diff(np.interp(edges, histogram.edges, cumulative))
    return out
