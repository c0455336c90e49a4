"""DeepSpeed's stages and accumulation: what cannot be combined with a mode is named before the first batch."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest

from lightning_ast.selection.faults import strategy_faults


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("stage", "accumulated", "told"),
    [(2, 1, []), (1, 4, ["set accumulate_grad_batches=1"]), (3, 1, ["use stage=1 or 2"])],
)
def test_deepspeed(stage: int, accumulated: int, told: list[str]) -> None:
    pytest.importorskip("deepspeed")
    strategy: Any = L.pytorch.strategies.DeepSpeedStrategy(stage=stage)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, accumulate_grad_batches=accumulated, logger=False
    )
    faults = list(strategy_faults(trainer))
    assert len(faults) == len(told)
    for fault, words in zip(faults, told, strict=True):
        assert words in fault
