from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.schedule import Schedule
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer


@pytest.mark.parametrize(
    ("warmup", "cooldown", "total", "expected"),
    [
        (2, 0, 6, "wwssss"),
        (1, 2, 6, "wssscc"),
        (0, 0, 4, "ssss"),
        (0.5, 0.25, 4, "wwsc"),
        (0.0, 0, 3, "sss"),
        (3, 0, None, "wwwss"),
    ],
)
def test_stages_by_epoch(warmup: float, cooldown: float, total: float | None, expected: str) -> None:
    schedule = Schedule(warmup_epochs=warmup, cooldown_epochs=cooldown)
    got = [schedule.stage_at(epoch, total) for epoch in range(len(expected))]
    assert "".join(stage[0] for stage in got) == expected


def test_shares_end_within_an_epoch() -> None:
    schedule = Schedule(warmup_epochs=0.25, cooldown_epochs=0.125)
    stages = [schedule.stage_at(step / 8, 2) for step in range(16)]
    assert stages == ["warmup"] * 4 + ["sparse"] * 10 + ["cooldown"] * 2


class Stages(pl.Callback):
    def __init__(self, selection: SparseSelectionCallback) -> None:
        self.selection, self.seen = selection, ""

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen += self.selection.stage[0]


def run(digits: Digits, scheduler: TwoStageScheduler | None, first: bool = True, **options: Any) -> str:
    """Stage of every batch of a real run with 4 batches an epoch."""
    selection = SparseSelectionCallback()
    stages = Stages(selection)
    chain: list[pl.Callback] = [selection, stages]
    if scheduler is not None:
        chain.insert(0 if first else 2, scheduler)
    quiet_trainer(callbacks=chain, **options).fit(PlainNet(), loader(digits, batch_size=128))
    return stages.seen


def test_real_runs(digits: Digits) -> None:
    assert run(digits, None) == "ssss", "without a scheduler every step is sparse"
    for first in (True, False):
        assert run(digits, TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1), first, max_epochs=3) == "wwwwsssscccc"
    assert run(digits, TwoStageScheduler(warmup_epochs=0.25), max_epochs=1) == "wsss"
    assert (
        run(digits, TwoStageScheduler(warmup_epochs=0.25, cooldown_epochs=0.25), max_epochs=-1, max_steps=8)
        == "wwsssscc"
    )
    assert run(digits, TwoStageScheduler(warmup_epochs=1), max_epochs=-1, max_steps=6) == "wwwwss"
    assert run(digits, TwoStageScheduler(warmup_epochs=0.5), max_epochs=2, accumulate_grad_batches=2) == "wwwwssss"


def test_target_of_the_scheduler_wins(digits: Digits) -> None:
    selection = SparseSelectionCallback(target_activation_rate=0.9)
    scheduler = TwoStageScheduler(warmup_epochs=0, target_activation_rate=0.25)
    with pytest.warns(UserWarning, match="TwoStageScheduler counts, 0.25"):
        quiet_trainer(callbacks=[selection, scheduler]).fit(PlainNet(), loader(digits, batch_size=128))
    assert selection.ledger.selected / 512 == pytest.approx(0.25, abs=0.04)


def test_resume_in_mid_epoch_finds_its_stage(digits: Digits, tmp_path: Any) -> None:
    """Lightning does not call on_train_epoch_start then: the stage follows from the step."""
    path = tmp_path / "mid.ckpt"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(path)

    scheduler = TwoStageScheduler(warmup_epochs=0.5)
    selection = SparseSelectionCallback()
    quiet_trainer(callbacks=[selection, scheduler, Save()]).fit(PlainNet(), loader(digits, batch_size=128))
    resumed = SparseSelectionCallback()
    stages = Stages(resumed)
    chain = [resumed, TwoStageScheduler(warmup_epochs=0.5), stages]
    quiet_trainer(callbacks=chain).fit(PlainNet(), loader(digits, batch_size=128), ckpt_path=path)
    assert stages.seen == "s"
    assert resumed.session.selector.steps == 2


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"warmup_epochs": -1}, {}, "warmup_epochs: expected an int >= 0"),
        ({"warmup_epochs": 1.0}, {}, r"float in \[0, 1\)"),
        ({"warmup_epochs": 3}, {"max_epochs": 3}, "leave no sparse step"),
        ({"warmup_epochs": 0.6, "cooldown_epochs": 0.5}, {"max_epochs": 3}, "leave no sparse step"),
        ({"warmup_epochs": 2}, {"max_epochs": -1, "max_steps": 8}, "leave no sparse step"),
        ({"cooldown_epochs": 1}, {"max_epochs": -1}, "known length"),
        ({"target_activation_rate": 0.0}, {"max_epochs": 3}, r"rate in \(0, 1\]"),
    ],
)
def test_faults(digits: Digits, options: dict[str, Any], trainer: dict[str, Any], message: str) -> None:
    module = PlainNet()
    chain = [TwoStageScheduler(**options), SparseSelectionCallback()]
    with pytest.raises(ValueError, match=message):
        quiet_trainer(callbacks=chain, **trainer).fit(module, loader(digits, batch_size=128))
    assert module.seen == []


def test_alone_it_is_an_error(digits: Digits) -> None:
    with pytest.raises(ValueError, match="add a SparseSelectionCallback"):
        quiet_trainer(callbacks=[TwoStageScheduler()]).fit(PlainNet(), loader(digits))


def test_fast_dev_run_is_allowed(digits: Digits) -> None:
    chain = [SparseSelectionCallback(), TwoStageScheduler(warmup_epochs=5)]
    pl.Trainer(
        fast_dev_run=True, accelerator="cpu", callbacks=chain, enable_progress_bar=False, enable_model_summary=False
    ).fit(PlainNet(), loader(digits))


def test_an_open_ended_run_with_a_whole_warmup(digits: Digits) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 6

    selection = SparseSelectionCallback()
    stages = Stages(selection)
    chain = [selection, TwoStageScheduler(warmup_epochs=1), stages, Stop()]
    torch.manual_seed(0)
    quiet_trainer(callbacks=chain, max_epochs=-1).fit(PlainNet(), loader(digits, batch_size=128))
    assert stages.seen.startswith("wwwwss")
