"""Schedulers of a user's own: subclasses, settings that change in a run, callbacks that are added late, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_ast import CheckpointError, ConfigurationError, SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer

PER_EPOCH = 3


def steps(digits: Digits, *callbacks: pl.Callback, selection: SparseSelectionCallback | None = None) -> dict[str, int]:
    selection = selection or SparseSelectionCallback()
    data = loader(tuple(part[: 64 * PER_EPOCH] for part in digits))
    quiet_trainer(max_epochs=4, callbacks=[*callbacks, selection]).fit(PlainNet(), data)
    return {stage: totals.steps for stage, totals in selection.ledger.stages.items()}


def test_an_overridden_stage_is_asked(digits: Digits) -> None:
    class Later(TwoStageScheduler):
        def stage(self, trainer: pl.Trainer, batch_idx: int) -> Any:
            return "warmup" if trainer.current_epoch < 2 else super().stage(trainer, batch_idx)

    assert steps(digits, Later(warmup_epochs=1)) == {"warmup": 2 * PER_EPOCH, "sparse": 2 * PER_EPOCH}


def test_a_warmup_that_is_changed_after_setup_counts(digits: Digits) -> None:
    scheduler = TwoStageScheduler(warmup_epochs=1)

    class Change(pl.Callback):
        def on_fit_start(self, *_: Any) -> None:
            scheduler.warmup_epochs = 3

    assert steps(digits, scheduler, Change()) == {"warmup": 3 * PER_EPOCH, "sparse": PER_EPOCH}


def test_overridden_faults_are_asked_before_the_first_batch(digits: Digits) -> None:
    class Strict(TwoStageScheduler):
        def faults(self, trainer: pl.Trainer, **known: Any) -> list[str]:
            return ["a rule of my own"] if known["batches_known"] else []

    with pytest.raises(ConfigurationError, match="a rule of my own"):
        steps(digits, Strict())


def test_a_scheduler_that_another_callback_adds_is_no_error(digits: Digits) -> None:
    class Add(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            trainer.callbacks.append(TwoStageScheduler(warmup_epochs=1))

    selection = SparseSelectionCallback()
    data = loader(tuple(part[:64] for part in digits))
    quiet_trainer(callbacks=[selection, Add()]).fit(PlainNet(), data)
    assert set(selection.ledger.stages) == {"sparse"}


def test_alone_it_is_refused_before_the_module_is_set_up(digits: Digits) -> None:
    class Late(PlainNet):
        def setup(self, stage: str) -> None:
            raise AssertionError("the module was set up")

    with pytest.raises(ConfigurationError, match="nothing to switch"):
        quiet_trainer(callbacks=[TwoStageScheduler()]).fit(Late(), loader(digits))


def test_a_used_scheduler_is_copied_without_the_selection(digits: Digits) -> None:
    scheduler = TwoStageScheduler(warmup_epochs=1)
    selection = SparseSelectionCallback(significance=lambda losses, *_: losses)
    steps(digits, scheduler, selection=selection)
    assert pickle.loads(pickle.dumps(scheduler)).schedule == scheduler.schedule
    assert copy.deepcopy(scheduler).schedule == scheduler.schedule


def test_a_damaged_state_is_named_by_the_key_of_a_subclass(digits: Digits) -> None:
    class Own(SparseSelectionCallback):
        @property
        def state_key(self) -> str:
            return "mine"

    class Damage(pl.Callback):
        def on_train_end(self, *_: Any) -> None:
            selection.load_state_dict({**selection.state_dict(), "ledger": 3})

    selection = Own()
    with pytest.raises(CheckpointError, match="remove 'mine'"):
        steps(digits, Damage(), selection=selection)
