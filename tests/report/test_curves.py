"""Smoothing and rebinning, against slow oracles and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_ast.report.dashboard import smooth
from lightning_ast.report.series import Histogram, rebin

NAN = float("nan")


def test_smoothing_has_no_bias_at_the_start_and_passes_over_nan() -> None:
    assert smooth(np.full(50, 3.0)).tolist() == pytest.approx([3.0] * 50)
    out = smooth(np.array([NAN, 1.0, NAN, 3.0]), span=3)  # decay 1/2
    assert np.isnan(out[0])
    assert out[1:].tolist() == pytest.approx([1.0, 1.0, (0.25 * 1 + 0.5 * 3) / 0.75])
    oracle = [
        sum(0.5 ** (i - j) * v for j, v in enumerate([4.0, 2.0, 8.0][: i + 1])) / sum(0.5**k for k in range(i + 1))
        for i in range(3)
    ]
    assert smooth(np.array([4.0, 2.0, 8.0]), span=3).tolist() == pytest.approx(oracle)


def test_rebinning_keeps_the_samples() -> None:
    histogram = Histogram(0, np.array([0.0, 0.1, 0.5, 2.0]), np.array([3.0, 4.0, 9.0]))
    assert rebin(histogram, np.linspace(0, 2, 31)).sum() == pytest.approx(16)
    assert rebin(histogram, np.array([0.0, 0.5, 1.25, 2.0])).tolist() == pytest.approx([7.0, 4.5, 4.5])
    same = Histogram(0, np.array([2.0, 2.0, 2.0]), np.array([0.0, 5.0]))
    assert rebin(same, np.array([0.0, 1.0, 3.0])).tolist() == [0.0, 5.0]
