"""Lightning's own monitors and profilers beside the callback: they keep working, and ThroughputMonitor tells the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.trainer.states import RunningStage

from lightning_ast import EnergyMonitor, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.logs import table
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer


class Told(ThroughputMonitor):
    """Notes what each update was told."""

    def __init__(self) -> None:
        super().__init__(batch_size_fn=lambda batch: len(batch[1]), window_size=2)
        self.training: list[float | None] = []
        self.validation: list[float | None] = []

    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, iter_num: int) -> None:
        told = self.training if trainer.state.stage == RunningStage.TRAINING else self.validation
        told.append(pl_module.flops_per_batch)
        super()._update(trainer, pl_module, batch, iter_num)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode", ["partial", "subset", "mask", "prune"])
def test_throughput_is_told_the_flops_of_each_batch(digits: Digits, tmp_path: Path, mode: str, first: bool) -> None:
    throughput, selection = Told(), SparseSelectionCallback(mode=mode)
    chain = [selection, TwoStageScheduler(warmup_epochs=1)]
    spent: list[float] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            spent.append(selection.ledger.spent_flops())

    trainer = quiet_trainer(
        max_epochs=3,
        callbacks=[throughput, *chain, Spy()] if first else [*chain, Spy(), throughput],
        logger=CSVLogger(str(tmp_path), name=""),
        log_every_n_steps=1,
    )
    module = PlainNet()
    trainer.fit(module, loader(digits, batch_size=64, drop_last=True), loader(digits, batch_size=512))
    each = [after - before for before, after in zip([0.0, *spent], spent, strict=False)]
    assert throughput.training == pytest.approx(each, rel=1e-6)
    assert min(each) < 0.9 * max(each) or mode in ("mask", "prune"), "a sparse batch costs less, or there are fewer"
    assert throughput.validation == [None] * 3, "a validation batch is not a training batch"
    assert not hasattr(module, "flops_per_batch"), "the module is as it was"
    assert any(name.endswith("flops_per_sec") for name in table(tmp_path / "version_0"))


def test_a_modules_own_flops_are_left_alone(digits: Digits) -> None:
    class Own(PlainNet):
        @property
        def flops_per_batch(self) -> float:
            return 7.0

    own, attribute = Own(), PlainNet()
    attribute.flops_per_batch = 8.0
    for module, value in ((own, 7.0), (attribute, 8.0)):
        throughput = Told()
        quiet_trainer(callbacks=[throughput, SparseSelectionCallback()]).fit(module, loader(digits))
        assert set(throughput.training) == {value}
        assert module.flops_per_batch == value


def test_device_stats_are_logged_beside_ours(digits: Digits, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    monitors = [DeviceStatsMonitor(cpu_stats=True), SparseTrainingMonitor(), EnergyMonitor(meters=[])]
    trainer = quiet_trainer(
        max_epochs=3,
        callbacks=[SparseSelectionCallback(), TwoStageScheduler(), *monitors],
        logger=CSVLogger(str(tmp_path), name=""),
        log_every_n_steps=1,
    )
    trainer.fit(PlainNet(), loader(digits))
    text = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "DeviceStatsMonitor.on_train_batch_start/cpu_percent" in text
    assert "ast/activation_rate" in text
    assert "energy/epoch_seconds" in text


@pytest.mark.parametrize("mode", ["partial", "subset", "prune"])
@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
@pytest.mark.filterwarnings("ignore")
def test_profilers_keep_working(digits: Digits, tmp_path: Path, kind: Any, mode: str) -> None:
    profiler = kind(dirpath=str(tmp_path), filename="profile")
    chain = [SparseSelectionCallback(mode=mode), TwoStageScheduler(), SparseTrainingMonitor(), EnergyMonitor(meters=[])]
    torch.manual_seed(0)
    trainer = quiet_trainer(max_epochs=2, callbacks=chain, profiler=profiler)
    trainer.fit(PlainNet(), loader(digits))
    summary = "".join(path.read_text() for path in tmp_path.glob("*profile*.txt"))
    assert "SparseSelectionCallback.on_train_batch_start" in summary or kind is PyTorchProfiler
    assert len(summary) > 500
