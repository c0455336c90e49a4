"""A mode that saves FLOPs and takes longer than dense training is told of, once and early."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.selection.accounting import SETTLE_STEPS
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import fit


class Clock:
    """Goes by what steps are said to take: what they take on a busy machine is chance."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _judge_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ast.selection.accounting.STEPS_TO_JUDGE", 8)
    monkeypatch.setattr("lightning_ast.selection.accounting.time", CLOCK)


class Delayed(PlainNet):
    """A network whose steps take longer in one of the two epochs."""

    slow_epoch = 1

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        CLOCK.seconds += 0.06 if self.current_epoch == self.slow_epoch else 0.04
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        return loss


def train(mode: str, *, slow_epoch: int, batches: int = 14, watch: pl.Callback | None = None) -> None:
    data = TensorDataset(torch.rand(8 * batches, 1, 8, 8), torch.randint(10, (8 * batches,)))
    selection = SparseSelectionCallback(mode=mode)  # type: ignore[arg-type]
    module = fresh(Delayed, batchnorm=False)
    module.slow_epoch = slow_epoch
    watches = [] if watch is None else [watch]
    fit(module, DataLoader(data, 8), selection, TwoStageScheduler(warmup_epochs=1), *watches, max_epochs=2)


def told(caplog: pytest.LogCaptureFixture) -> bool:
    return any("times as long as a dense one" in record.getMessage() for record in caplog.records)


def test_slow_sparse_steps_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train("partial", slow_epoch=1)
    assert told(caplog)
    assert "the limit of mode='partial' here" in caplog.text


def test_slow_sparse_steps_are_told_of_once_and_long_before_the_end(caplog: pytest.LogCaptureFixture) -> None:
    known: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            known.append(told(caplog))

    with caplog.at_level("INFO"):
        train("partial", slow_epoch=1, watch=Watch(), batches=20)
    assert known.index(True) == 20 + SETTLE_STEPS + 8 - 1
    assert sum("times as long as a dense one" in record.getMessage() for record in caplog.records) == 1


def test_one_long_step_is_no_slow_mode(caplog: pytest.LogCaptureFixture) -> None:
    """A GPU prepares its kernels anew for each number of samples."""

    class Pause(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 8:
                CLOCK.seconds += 1.5

    with caplog.at_level("INFO"):
        train("partial", slow_epoch=-1, watch=Pause())
    assert not told(caplog)


@pytest.mark.parametrize(("mode", "slow_epoch", "batches"), [("partial", 0, 14), ("partial", 1, 9), ("mask", 1, 14)])
def test_other_runs_end_in_silence(mode: str, slow_epoch: int, batches: int, caplog: pytest.LogCaptureFixture) -> None:
    """Steps as quick as dense ones, few steps, and a mode for comparisons."""
    with caplog.at_level("INFO"):
        train(mode, slow_epoch=slow_epoch, batches=batches)
    assert not told(caplog)
