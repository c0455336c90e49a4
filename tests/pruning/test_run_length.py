"""What Lightning and the schedules count in mode ``prune``: steps and epochs of a run whose epochs differ in length."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.loops.fit_loop import _FitLoop

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.pruning.run_plan import EpochLengths, PlannedRun
from lightning_ast.schedule import RunLength, Schedule
from tests.helpers.training import quiet_trainer
from tests.pruning.prune_by_hand import (
    SIZE,
    Cycle,
    Witness,
    fit,
    fresh,
    loader,
    pruned,
)


class Once(Cycle):
    """Whose schedule raises when it is stepped once more than planned."""

    def configure_optimizers(self) -> Any:
        optimizers, (scheduler,) = super().configure_optimizers()
        scheduler["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(
            optimizers[0], max_lr=0.2, total_steps=self.steps, div_factor=10, final_div_factor=100
        )
        return optimizers, [scheduler]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 5},
        {"max_epochs": 5, "accumulate_grad_batches": 3},
        {"max_epochs": 9, "max_steps": 37},
        {"max_epochs": -1, "max_steps": 37, "cooldown": 2},
        {"max_epochs": -1, "max_steps": 41, "cooldown": 0.2, "warmup": 0.3},
        {"max_epochs": 10, "cooldown": 0.125, "warmup": 0.1},
        {"max_epochs": 4, "limit_train_batches": 6},
        {"max_epochs": 3, "cooldown": 0, "warmup": 0},
    ],
    ids=str,
)
def test_step_wise_schedules_end_with_the_run(limits: dict[str, Any]) -> None:
    module = fresh(Once)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    callback = pruned()
    stages: dict[int, str] = {}

    class Stages(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            assert stages.setdefault(trainer.current_epoch, callback.stage) == callback.stage, "one stage an epoch"

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of")
        trainer = fit(module, loader(shuffle=True), callback, Rates(), Stages(), **limits)
    assert trainer.global_step == module.steps
    assert callback.planned_steps(trainer) is not None
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert schedule.last_epoch == module.steps or schedule.last_epoch == module.steps - 1
    assert max(rates) == pytest.approx(0.2, rel=0.2)
    assert min(rates[-3:]) < 0.02, "it came down"
    lengths = [len(indices) for indices in module.epochs().values()]
    assert "sparse" in stages.values()
    if "max_steps" not in limits:
        assert lengths == [120 if stages[e] == "sparse" else lengths[0] for e in range(len(lengths))] or limits.get(
            "limit_train_batches"
        )


def test_estimated_steps_without_prune_and_outside_a_fit_are_lightnings_own() -> None:
    module = fresh(Cycle)
    trainer = fit(module, loader(), SparseSelectionCallback(), max_epochs=4)
    assert module.steps == 4 * 10
    trainer = fit(fresh(Cycle), loader(), pruned())
    assert type(trainer) is pl.Trainer
    assert type(trainer.fit_loop) is _FitLoop


def test_the_planned_number_of_steps_is_offered_by_the_callback() -> None:
    callback = pruned()
    told = []

    class Asks(Witness):
        def configure_optimizers(self) -> Any:
            told.append(callback.planned_steps(self.trainer))
            return super().configure_optimizers()

    trainer = fit(fresh(Asks), loader(shuffle=True), callback)
    assert told == [2 * 10 + 2 * 4] == [trainer.global_step]


@pytest.mark.parametrize(("options", "expected"), [({"fast_dev_run": True}, [13]), ({"max_steps": 12}, [SIZE, 64])])
def test_short_runs(options: dict[str, Any], expected: list[int]) -> None:
    module = fresh()
    trainer = quiet_trainer(callbacks=[pruned(), TwoStageScheduler()], **{"max_epochs": 4, **options})
    trainer.fit(module, loader(shuffle=True))
    assert [len(indices) for indices in module.epochs().values()] == expected


def test_no_training_batches() -> None:
    """As without this callback: nothing is trained, and the trainer's estimate is its own."""
    module = fresh()

    class Asks(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.steps = trainer.estimated_stepping_batches

    plain, asks = Asks(), Asks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(callbacks=[plain], max_epochs=4, limit_train_batches=0).fit(fresh(), loader())
        fit(module, loader(), pruned(), asks, limit_train_batches=0)
    assert module.batches == []
    assert asks.steps == plain.steps


@pytest.mark.parametrize("scheduling", [{2: 4}, {0: 4, 2: 1}, {1: 3, 3: 2}])
@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 13}])
def test_steps_with_scheduled_accumulation(scheduling: dict[int, int], limits: dict[str, int]) -> None:
    module = fresh(Cycle)
    trainer = fit(module, loader(), pruned(), GradientAccumulationScheduler(scheduling), cooldown=0, **limits)
    assert trainer.global_step == module.steps


@pytest.mark.parametrize("cooldown", [0, 1])
@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:SWA is currently")
def test_weight_averaging_adds_no_epoch_to_the_plan(cooldown: int) -> None:
    """It does add one to the run where there is BatchNorm, whose statistics it renews."""
    module = fresh(Cycle)
    fit(module, loader(), pruned(), StochasticWeightAveraging(0.05, swa_epoch_start=2), cooldown=cooldown)
    assert module.steps == (2 * 10 + 2 * 4 if cooldown else 10 + 3 * 4)
    lengths = [SIZE, 120, 120, SIZE if cooldown else 120, SIZE]
    assert [len(indices) for indices in module.epochs().values()] == lengths


def test_planned_steps_are_not_known_before_the_fit() -> None:
    with pytest.raises(RuntimeError, match="ask for it in configure_optimizers"):
        pruned().planned_steps(quiet_trainer())


@pytest.mark.parametrize("accumulate", [{0: 1}, {0: 3, 2: 1, 7: 5}])
@pytest.mark.parametrize("schedule", [None, (2, 3), (0.25, 0.25), (0, 1)])
def test_the_planned_run_is_that_of_its_epochs(accumulate: dict[int, int], schedule: Any) -> None:
    """Against a count epoch by epoch, and at once for a run without a foreseeable end."""
    stages = Schedule() if schedule is None else Schedule(warmup_epochs=schedule[0], cooldown_epochs=schedule[1])
    dense, sparse = EpochLengths(100, 10), EpochLengths(40, 4)

    def run(**limits: Any) -> PlannedRun:
        return PlannedRun(stages, dense, sparse, RunLength(batches=dense.batches, accumulate=accumulate, **limits))

    def steps(total: int) -> int:
        count = 0
        for epoch in range(total):
            factor = accumulate[max(e for e in accumulate if e <= epoch)]
            length = sparse if run(max_epochs=total).stage(epoch) == "sparse" else dense
            count += -(-length.batches // factor)
        return count

    for total in range(1, 20):
        planned = run(max_epochs=total)
        assert planned.steps == steps(total)
        first, end = planned.sparse_range(total)
        assert end - first == sum(planned.stage(epoch) == "sparse" for epoch in range(total))
    for most in range(1, 60):
        planned = run(max_steps=most)
        assert steps(planned.total_epochs - 1) < most <= steps(planned.total_epochs)
        assert planned.steps == most
    endless = run(max_steps=10**12)
    assert endless.stage(endless.total_epochs // 2) == "sparse"
