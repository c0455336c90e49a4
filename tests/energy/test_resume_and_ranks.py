"""Joules of runs that are resumed and of several processes: each is counted once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_ast import EnergyMonitor, SparseSelectionCallback, TwoStageScheduler
from tests.energy.counted_run import BATCHES, Meter
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import gloo, quiet_trainer


@pytest.mark.parametrize("stop", [5, 8], ids=["mid-epoch", "last-batch"])
def test_an_interrupted_epoch_is_added_up_whole(digits: Digits, tmp_path: Path, stop: int) -> None:
    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            meter.joules += 30
            return super().training_step(batch, batch_idx)

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                raise KeyboardInterrupt

    meter = Meter()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        quiet_trainer(callbacks=[EnergyMonitor(meters=[meter]), Stop()], max_epochs=2).fit(
            Net(), loader(digits, batch_size=64)
        )
    meter = Meter()  # another counter, that starts anew
    resumed = EnergyMonitor(meters=[meter])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(callbacks=[resumed], max_epochs=2).fit(
            Net(), loader(digits, batch_size=64), ckpt_path=tmp_path / "mid.ckpt"
        )
    assert [costs.epoch for costs in resumed.epochs] == [0, 1]
    assert [costs.gpu_joules for costs in resumed.epochs] == [30 * BATCHES] * 2


def resumed(digits: Digits, folder: Path, *meters: list[Meter]) -> tuple[EnergyMonitor, SparseSelectionCallback]:
    """A run of four epochs, the first two dense, that is interrupted after two; with these meters before and after."""

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            for meter in present:
                meter.joules += 10
            return super().training_step(batch, batch_idx)

    for part, present in enumerate(meters):
        energy, selection = EnergyMonitor(meters=present), SparseSelectionCallback(mode="mask")
        trainer = quiet_trainer(
            callbacks=[energy, selection, TwoStageScheduler(warmup_epochs=2)], max_epochs=4 if part else 2
        )
        if not part:
            trainer = quiet_trainer(
                callbacks=[energy, selection, TwoStageScheduler(warmup_epochs=2), StopAt(folder)], max_epochs=4
            )
        trainer.fit(Net(), loader(digits, batch_size=64), ckpt_path=folder / "two.ckpt" if part else None)
    return energy, selection


class StopAt(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "two.ckpt")
            trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:lightning-ast. the run ended after")
def test_savings_go_on_with_the_same_meters_and_not_with_others(digits: Digits, tmp_path: Path) -> None:
    def both() -> list[Meter]:
        return [Meter("gpu"), Meter("cpu", "the CPU")]

    _, selection = resumed(digits, tmp_path, both(), both())
    assert selection.savings["joules"] == 0.0
    with pytest.warns(UserWarning, match=r"measured \['cpu of the test', 'gpu of the test'\] energy and this one"):
        energy, selection = resumed(digits, tmp_path, both(), [Meter("gpu")])
    assert selection.savings["joules"] is None, "20 J a step before and 10 J after are no saving"
    assert [costs.gpu_joules for costs in energy.epochs] == [10 * BATCHES] * 4


class Sum(pl.Callback):
    """Writes what each rank's monitor found."""

    def __init__(self, folder: Path, energy: EnergyMonitor) -> None:
        self.folder, self.energy = folder, energy

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = [costs.gpu_joules for costs in self.energy.epochs]
        torch.save((found, self.energy.names), self.folder / f"rank{trainer.global_rank}.pt")


class OwnMeter(Meter):
    """Of the process that it is read in: rank 1 draws ten times as much; or both are one device."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared

    @property
    def identity(self) -> str:
        return "one" if self.shared else f"device {torch.distributed.get_rank()}"

    @identity.setter
    def identity(self, value: str) -> None:
        pass


class RankNet(PlainNet):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.meter.joules += (1, 10)[self.global_rank]
        return super().training_step(batch, batch_idx)


class SaveAtThree(pl.Callback):
    """Writes a checkpoint in the midst of an epoch, and stops there or goes on."""

    def __init__(self, path: Path, *, stop: bool) -> None:
        self.path, self.stop = path, stop

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.stop and trainer.global_step == 3:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.filterwarnings("ignore")
def test_shared_hardware_is_counted_once_after_a_resume_too(digits: Digits, tmp_path: Path) -> None:
    for part in (0, 1):
        meter = OwnMeter(shared=True)
        energy = EnergyMonitor(meters=[meter])
        trainer = quiet_trainer(
            devices=2,
            strategy=gloo(),
            callbacks=[energy, SaveAtThree(tmp_path / "mid.ckpt", stop=not part), Sum(tmp_path, energy)],
            max_epochs=1,
            min_epochs=0,
        )
        path = tmp_path / "mid.ckpt" if part else None
        trainer.fit(RankNet(meter), loader(digits, batch_size=64), ckpt_path=path)
    assert [torch.load(tmp_path / f"rank{rank}.pt")[0] for rank in (0, 1)] == [[4.0], [4.0]]


@pytest.mark.parametrize(("shared", "joules"), [(False, 11.0 * 4), (True, 1.0 * 4)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_every_rank_counts_its_own_device_once(digits: Digits, tmp_path: Path, shared: bool, joules: float) -> None:
    meter = OwnMeter(shared)
    energy = EnergyMonitor(meters=[meter])
    trainer = quiet_trainer(
        devices=2,
        strategy=gloo(),
        callbacks=[energy, Sum(tmp_path, energy)],
        max_epochs=2,
    )
    trainer.fit(RankNet(meter), loader(digits, batch_size=64))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0][0] == ranks[1][0] == [joules] * 2
    assert [len(names) for _, names in ranks] == ([1, 0] if shared else [1, 1])
