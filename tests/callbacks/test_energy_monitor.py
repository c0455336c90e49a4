"""Joules and seconds of each epoch: from counters that count what the test says, and clocks that the test moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_ast import EnergyMonitor, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.energy import ReplayedMeter
from lightning_ast.selection.accounting import SETTLE_STEPS
from tests.energy.counted_run import BATCHES, Meter
from tests.helpers.data import Digits, loader
from tests.helpers.logs import scalars
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer


class Drawing(PlainNet):
    """Draws 30 J in a dense step, 12 J in a sparse one, 400 J more in the first steps of a stage, 1000 J in validation."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(dropout=0.0)
        self.meter = meter

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sparse = self.trainer.current_epoch >= 2
        self.meter.joules += 12 if sparse else 30
        if self.trainer.current_epoch in (0, 2) and batch_idx < SETTLE_STEPS:
            self.meter.joules += 400
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.meter.joules += 1000
        super().validation_step(batch, batch_idx)


def fit(digits: Digits, meter: Meter, *, first: bool, **options: Any) -> tuple[EnergyMonitor, SparseSelectionCallback]:
    selection = SparseSelectionCallback()
    energy = EnergyMonitor(meters=[meter])
    chain = [selection, TwoStageScheduler(warmup_epochs=2)]
    trainer = quiet_trainer(**{"max_epochs": 4, **options}, callbacks=[energy, *chain] if first else [*chain, energy])
    trainer.fit(Drawing(meter), loader(digits, batch_size=64), loader(digits, batch_size=512))
    return energy, selection


@pytest.mark.parametrize("first", [True, False])
def test_savings_are_those_of_settled_training_steps(digits: Digits, first: bool) -> None:
    energy, selection = fit(digits, Meter(), first=first)
    settling = 400 * SETTLE_STEPS
    dense, sparse = 30 * BATCHES, 12 * BATCHES
    assert [costs.gpu_joules for costs in energy.epochs] == [
        dense + settling + 1000,
        dense + 1000,
        sparse + settling + 1000,
        sparse + 1000,
    ]
    assert [costs.cpu_joules for costs in energy.epochs] == [None] * 4
    assert energy.joules == 2 * (dense + sparse + settling + 2000)
    # 12 J instead of 30 J in half of the epochs: neither start-up nor validation is in it
    assert selection.savings["joules"] == pytest.approx(1 - (30 + 12) / 60)
    assert selection.ledger.stages["warmup"].joules == 30 * (2 * BATCHES - SETTLE_STEPS)
    assert selection.ledger.stages["warmup"].joules_offered == 64 * (2 * BATCHES - SETTLE_STEPS)


def test_counters_are_read_at_boundaries_alone(digits: Digits) -> None:
    few, many = Meter(), Meter()
    fit(digits, few, first=True, limit_train_batches=4)
    fit(digits, many, first=True)
    assert few.reads == many.reads
    assert few.reads <= 1 + 4 * 4 + 3  # begin; an epoch's first batch and end, its validation's two ends; stages


def test_a_stage_that_begins_within_an_epoch_is_told_apart(digits: Digits) -> None:
    meter = Meter()

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            meter.joules += 30 if self.trainer.global_step < 12 else 12
            return super().training_step(batch, batch_idx)

    selection = SparseSelectionCallback()
    chain = [EnergyMonitor(meters=[meter]), selection, TwoStageScheduler(warmup_epochs=0.5)]
    quiet_trainer(callbacks=chain, max_epochs=3).fit(Net(), loader(digits, batch_size=64))
    stages = selection.ledger.stages
    assert (stages["warmup"].joules, stages["warmup"].joules_offered) == (30 * 9, 64 * 9)
    assert (stages["sparse"].joules, stages["sparse"].joules_offered) == (12 * 9, 64 * 9)


def test_savings_reach_the_event_file(digits: Digits, tmp_path: Path) -> None:
    energy, _ = fit(digits, Meter(), first=True, logger=TensorBoardLogger(str(tmp_path), name=""), log_every_n_steps=1)
    read = {tag: [value for _, value in points] for tag, points in scalars(tmp_path / "version_0").items()}
    assert read["energy/gpu_joules"] == read["energy/epoch_joules"] == [c.gpu_joules for c in energy.epochs]
    assert read["energy/total_joules"][-1] == energy.joules
    assert read["energy/total_seconds"][-1] == pytest.approx(energy.seconds, rel=1e-4)
    parts = ("loading", "scoring", "forward_backward", "validation", "other")
    for epoch, whole in enumerate(read["energy/epoch_seconds"]):
        assert whole == pytest.approx(sum(read[f"energy/{part}_seconds"][epoch] for part in parts), rel=1e-4)
    assert "energy/cpu_joules" not in read
    assert read["ast/savings_joules"] == pytest.approx([0.0, 0.0, 1 - (30 * 2 + 12) / 90, 0.3]), (
        "as of each epoch's end"
    )


def test_a_plain_run_is_measured_too(digits: Digits) -> None:
    meter, energy = Meter("cpu"), EnergyMonitor()
    energy.meters = [meter]
    quiet_trainer(callbacks=[energy], max_epochs=2).fit(Drawing(meter), loader(digits), loader(digits, batch_size=512))
    steps = math.ceil(512 / 64)
    assert energy.epochs[1].cpu_joules == 30 * steps + 1000
    assert energy.epochs[1].gpu_joules is None
    assert energy.names == ["cpu of the test"]


def test_what_cannot_be_measured_is_none_and_said_once(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_ast.energy.energy_ledger.rank_zero_info", said.append)
    monkeypatch.setattr(
        "lightning_ast.energy.energy_ledger.find_meters", lambda device: ([], ["no counter", "nor here"])
    )
    energy, selection = EnergyMonitor(), SparseSelectionCallback()
    chain = [energy, selection, TwoStageScheduler(warmup_epochs=1)]
    quiet_trainer(callbacks=chain, max_epochs=3).fit(PlainNet(), loader(digits))
    assert said == ["lightning-ast: energy is not measured: no counter; nor here."]
    assert energy.joules is None
    assert [costs.epoch_joules for costs in energy.epochs] == [None] * 3
    assert selection.savings["joules"] is None
    assert all(costs.forward_backward_seconds > 0 for costs in energy.epochs)


def test_a_counter_that_fails_is_unknown_from_there(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_ast.energy.energy_ledger.rank_zero_warn", said.append)
    meter = Meter()

    class Breaks(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            meter.broken = trainer.current_epoch >= 1

    energy = EnergyMonitor(meters=[meter])
    quiet_trainer(callbacks=[energy, Breaks()], max_epochs=3).fit(Drawing(meter), loader(digits))
    assert energy.epochs[0].gpu_joules is not None
    assert [costs.gpu_joules for costs in energy.epochs[1:]] == [None, None]
    assert energy.joules is None, "a sum without two of three epochs would be wrong"
    assert said == ["lightning-ast: energy is no longer measured: the counter fell off."]


def test_a_recording_is_replayed(digits: Digits) -> None:
    energy = EnergyMonitor(meters=[ReplayedMeter([100.0, 160.0, 175.0, 300.0])])  # begin, validation's ends, end
    quiet_trainer(callbacks=[energy]).fit(PlainNet(), loader(digits), loader(digits))
    assert energy.epochs[0].gpu_joules == 200.0


def test_counters_that_come_round_are_read_in_time(digits: Digits) -> None:
    often, energy = Meter(), EnergyMonitor()
    often.longest_interval_seconds = 0.0
    energy.meters = [often]
    quiet_trainer(callbacks=[energy]).fit(Drawing(often), loader(digits, batch_size=64))
    assert often.reads >= BATCHES
    assert energy.epochs[0].gpu_joules == 30 * BATCHES + 400 * SETTLE_STEPS


class Gap(pl.Callback):
    """Draws joules between the epochs, as writing a checkpoint does."""

    def __init__(self, meter: Meter, joules: float) -> None:
        self.meter, self.joules = meter, joules

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.meter.joules += self.joules if trainer.current_epoch else 0


@pytest.mark.parametrize("warmup", [1, 3])
def test_what_lies_between_epochs_is_in_no_stage(digits: Digits, warmup: int) -> None:
    meter = Meter()

    class Net(PlainNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            meter.joules += 10
            return super().training_step(batch, batch_idx)

    energy, selection = EnergyMonitor(meters=[meter]), SparseSelectionCallback(mode="mask")
    chain = [energy, selection, TwoStageScheduler(warmup_epochs=warmup), Gap(meter, 20.0)]
    quiet_trainer(callbacks=chain, max_epochs=5).fit(Net(), loader(digits, batch_size=64))
    assert selection.savings["joules"] == 0.0
    assert energy.joules == 5 * 10 * BATCHES + 4 * 20, "they are spent nevertheless"


def test_no_measurement_of_the_sparse_stage_is_no_saving(digits: Digits) -> None:
    selection = SparseSelectionCallback(mode="prune")
    trainer = quiet_trainer(
        callbacks=[selection, TwoStageScheduler(warmup_epochs=1)], max_epochs=2, val_check_interval=0.25
    )
    trainer.fit(PlainNet(), loader(digits, batch_size=64), loader(digits, batch_size=512))
    assert selection.ledger.stages["sparse"].timed_offered == 0
    assert selection.savings["seconds"] is None


def test_scoring_is_measured_in_subset(digits: Digits) -> None:
    energy = EnergyMonitor(meters=[])
    chain = [SparseSelectionCallback(mode="subset"), TwoStageScheduler(warmup_epochs=1), energy]
    quiet_trainer(callbacks=chain, max_epochs=2).fit(PlainNet(), loader(digits))
    costs = energy.epochs[1]
    assert costs.scoring_seconds > 0
    assert costs.scoring_seconds + costs.forward_backward_seconds < costs.epoch_seconds, "each is counted once"
