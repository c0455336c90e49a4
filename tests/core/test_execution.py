"""What a mode costs."""

from __future__ import annotations

import pytest

from lightning_ast.core.execution import cost_share


@pytest.mark.parametrize(("mode", "expected"), [("mask", 1.0), ("subset", 2.2 / 3), ("partial", 0.6), ("prune", 0.4)])
def test_cost_model(mode: str, expected: float) -> None:
    assert cost_share(mode, 0.4) == pytest.approx(expected)
