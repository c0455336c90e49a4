"""The dashboard of a run with a target coverage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_ast.report.dashboard import dashboard
from lightning_ast.report.series import Run
from tests.report.conftest import long_run, made


def covered() -> Run:
    """A run that logs a coverage, and its target in place of that of the activation rate."""
    run = long_run(3, 4)
    scalars = {tag: series for tag, series in run.scalars.items() if tag != "ast/target_activation_rate"}
    added = made(
        {
            "ast/coverage": [(step, 0.9 + 0.01 * (step % 3)) for step in range(12)],
            "ast/target_coverage": [(step, 0.9) for step in range(12)],
        }
    )
    return replace(run, scalars={**scalars, **added.scalars})


def test_the_coverage_is_drawn_beside_its_target() -> None:
    axes = dashboard(run := covered()).axes[2]
    shown = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.lines}
    assert shown["coverage"].tolist() == run.scalars["ast/coverage"].values.tolist()
    assert shown["target coverage"].tolist() == [0.9] * 12
    assert "target" not in shown
    assert not [text for text in axes.texts if "not logged" in text.get_text()]


def test_the_coverage_of_a_fixed_rate_is_not_drawn() -> None:
    run = covered()
    fixed = {tag: series for tag, series in run.scalars.items() if tag != "ast/target_coverage"}
    fixed["ast/target_activation_rate"] = run.scalars["ast/target_coverage"]
    shown = {str(line.get_label()) for line in dashboard(replace(run, scalars=fixed)).axes[2].lines}
    assert "target" in shown
    assert not {"coverage", "target coverage"} & shown
