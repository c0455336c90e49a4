"""Epochs that are planned by a histogram, as those of data sets too large to sort: in whole runs, with a small limit."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import fresh
from tests.helpers.training import assert_same_weights, quiet_trainer, weights


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("core.selector", "core.plan_rules"):
        monkeypatch.setattr(f"lightning_ast.{file}.MANY", 100)


@pytest.mark.parametrize(
    "options",
    [{"target_activation_rate": 0.5}, {"target_coverage": 0.8}, {"target_coverage": 0.8, "gate": "soft"}],
    ids=["rate", "coverage", "soft"],
)
def test_a_run_trains_on_the_count_that_was_planned(options: dict[str, Any], digits: Digits) -> None:
    ends = []
    for _ in range(2):
        module: Any = fresh(dropout=0.0)
        callback = SparseSelectionCallback(mode="prune", **options)
        callbacks = [callback, TwoStageScheduler(warmup_epochs=1)]
        quiet_trainer(callbacks=callbacks, max_epochs=3).fit(module, loader(digits, batch_size=32))
        ends.append(weights(module))
        sparse = callback.ledger.stages["sparse"]
        assert sparse.offered == 2 * 512
        assert sum(module.seen) == 512 + sparse.selected
        if "target_coverage" in options:
            assert callback.coverage == pytest.approx(0.8, abs=0.03)
            assert sparse.selected < sparse.offered
        else:
            assert sparse.selected == 512
    assert_same_weights(*ends)
