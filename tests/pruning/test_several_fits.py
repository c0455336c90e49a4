"""Fits that follow each other, copies and the tuner in mode ``prune``."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    LearningRateFinder,
)
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.tuner import Tuner
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from lightning_ast import TwoStageScheduler
from tests.helpers.modules import PlainNet
from tests.helpers.training import quiet_trainer
from tests.pruning.prune_by_hand import (
    SIZE,
    Cycle,
    Indexed,
    epochs_by_hand,
    fit,
    fresh,
    loader,
    plan_by_hand,
    pruned,
)


def test_a_second_fit_goes_on() -> None:
    module, callback = fresh(), pruned()
    trainer = fit(module, loader(), callback, cooldown=0, max_epochs=2)
    selected = callback.ledger.selected
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    assert callback.ledger.selected == selected + 2 * 120
    for epoch in (1, 2, 3):
        assert module.epochs()[epoch] == plan_by_hand(module, list(range(SIZE)), epoch=epoch, count=120)
    trainer.fit_loop.max_epochs = 5
    assert type(trainer.fit_loop) is _FitLoop
    with pytest.warns(UserWarning, match="what was remembered is forgotten"):
        trainer.fit(module, loader(dataset=Indexed(200)))
    assert len(callback.session.epochs.history) == 200


def test_copies_and_pickles_after_and_within_a_fit() -> None:
    copies, trainers = [], []

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            copies.append(copy.deepcopy(callback))
            if trainer.current_epoch == 1 and not trainers:
                trainers.append(copy.deepcopy(trainer))

    callback = pruned()
    original = fresh()
    trainer = fit(original, loader(), callback, Copies())
    assert original.epochs() == epochs_by_hand(original)
    (within,) = trainers
    assert type(within) is pl.Trainer
    assert type(within.fit_loop) is _FitLoop
    within.callbacks, plain = [], fresh()
    within.fit(plain, loader(dataset=Indexed(60)))
    assert {len(indices) for indices in plain.epochs().values()} == {60}, "a copy without callbacks is a plain trainer"
    copies += [pickle.loads(pickle.dumps(callback)), copy.deepcopy(trainer).callbacks[0]]
    assert copies[-1].ledger.selected == copies[-2].ledger.selected == callback.ledger.selected
    assert copies[0].ledger.selected < callback.ledger.selected
    module = fresh()
    fit(module, loader(), copies[-1])
    assert module.epochs() == epochs_by_hand(module)


class Tunable(Cycle):
    """What Lightning's tuner wants of a module."""

    lr, batch_size = 0.1, 32

    def train_dataloader(self) -> Any:
        return loader(shuffle=True, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(Indexed().x, Indexed().y), batch_size=100)


@pytest.mark.parametrize(
    "cls", [Tunable, type("Plain", (Tunable,), {"configure_optimizers": PlainNet.configure_optimizers})]
)
@pytest.mark.parametrize("tuner", ["lr_find", "LearningRateFinder", "scale_batch_size"])
def test_the_tuner_works_on_dense_trials_and_leaves_the_run_alone(
    tuner: str, cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = fresh(cls)
    callbacks: list[Any] = [pruned(), TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1)]
    if tuner == "LearningRateFinder":
        callbacks.append(LearningRateFinder(num_training_steps=25, min_lr=0.01))
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=4, num_sanity_val_steps=0)
    if tuner == "lr_find":
        Tuner(trainer).lr_find(module, num_training=25, min_lr=0.01)
    elif tuner == "scale_batch_size":
        Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=1, init_val=20)
    trials = 25 if tuner == "LearningRateFinder" else 0
    module.batches = module.batches[:0]
    trainer.fit(module)
    module.batches = module.batches[trials:]
    seen = module.epochs()
    assert sorted(seen[0]) == sorted(seen[3]) == list(range(SIZE)), "all of them, once"
    assert [len(seen[e]) for e in range(4)] == [SIZE, 120, 120, SIZE]
    assert sorted(seen[1]) == sorted(plan_by_hand(module, list(range(SIZE)), epoch=1, count=120))
