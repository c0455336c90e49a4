"""The preparation of numbers for a figure: smoothed, thinned out, counted in other bins. Pure functions."""

from __future__ import annotations

import numpy as np

from lightning_ast.report.series import Floats, Histogram, Ints

__all__ = ["rebin", "smooth", "thin"]


def smooth(values: Floats, *, span: int | None = None) -> Floats:
    """Take the exponential moving average ``(n,)`` without the start's bias; NaN is passed over.

    Args:
        values: The values, ``(n,)``.
        span: The points that the mean reaches over; None takes a twentieth of them, at least 2.

    Example:
        >>> smooth(np.array([1.0, 3.0, 3.0]), span=3).round(2).tolist()
        [1.0, 2.33, 2.71]
    """
    decay = 1 - 2 / ((span or max(2, len(values) // 20)) + 1)
    mean = 0.0
    weight = 0.0
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values.tolist()):
        if np.isfinite(value):
            mean = decay * mean + (1 - decay) * value
            weight = decay * weight + 1 - decay
        if weight:
            out[i] = mean / weight
    return out


def thin(x: Floats | Ints, y: Floats, *, limit: int = 2000) -> tuple[Floats, Floats]:
    """Keep at most ``limit`` points ``(n,)``: the lowest and highest of each stretch, so that no spike is lost.

    Args:
        x: The places of the points, increasing.
        y: The values; NaN and infinity are left out.
        limit: The most points to keep, at least 2.
    """
    finite = np.isfinite(y)
    x = x[finite].astype(np.float64)
    y = y[finite]
    if len(y) <= limit:
        return x, y
    stretches = np.array_split(np.arange(len(y)), limit // 2)
    kept = sorted({int(i) for part in stretches for i in (part[y[part].argmin()], part[y[part].argmax()])})
    return x[kept], y[kept]


def rebin(histogram: Histogram, edges: Floats) -> Floats:
    """Count ``(m,)`` between other edges ``(m + 1,)``, each old count spread evenly over its bucket.

    Example:
        >>> rebin(Histogram(0, np.array([0.0, 1.0, 4.0]), np.array([2.0, 6.0])), np.array([0.0, 2.0, 4.0])).tolist()
        [4.0, 4.0]
    """
    cumulative = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    if histogram.edges[0] == histogram.edges[-1]:  # every value is the same
        return np.histogram(histogram.edges[:1], bins=edges, weights=cumulative[-1:])[0].astype(np.float64)
    out: Floats = np.diff(np.interp(edges, histogram.edges, cumulative))
    return out
