"""Copies and pickles made within a fit and behind it are their own."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import Tensor

from lightning_ast import PIController
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, assert_same_weights, quiet_trainer, weights
from tests.selection.plain_and_ours import DigitsData, assert_clean, data, like, only_new_objects, ours, seed


class Copies(pl.Callback):
    """Copies everything in two ways, once in each hook of each epoch."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.found: list[tuple[str, int, dict[str, Tensor], Any, list[Any], Any]] = []
        self.done: set[tuple[str, int]] = set()

    def duplicate(self, value: Any) -> Any:
        return copy.deepcopy(value) if self.how == "deepcopy" else pickle.loads(pickle.dumps(value))

    def take(self, hook: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking or (hook, trainer.current_epoch) in self.done:
            return
        self.done.add((hook, trainer.current_epoch))
        others = [c for c in trainer.callbacks if c is not self]
        mine = trainer.callbacks
        trainer.callbacks = others  # a datamodule brings its trainer, and that its callbacks: not these copies again
        try:
            copies = [self.duplicate(value) for value in (module, others, trainer.datamodule)]
        finally:
            trainer.callbacks = mine
        self.found.append((hook, trainer.current_epoch, weights(module), *copies))

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.take("on_train_batch_start", trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.take("on_train_batch_end", trainer, module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.take("on_train_epoch_end", trainer, module)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.take("on_validation_start", trainer, module)


def train_plainly(module: PlainNet, datamodule: DigitsData) -> dict[str, Tensor]:
    seed(5)
    trainer = quiet_trainer(limit_train_batches=3, limit_val_batches=0)
    trainer.fit(module, datamodule=datamodule)
    return weights(module)


@pytest.mark.parametrize(
    ("how", "place"),
    [
        ("deepcopy", "after"),
        ("pickle", "before"),
        pytest.param("deepcopy", "before", marks=pytest.mark.slow),
        pytest.param("pickle", "after", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_copies_within_and_after_a_fit_are_their_own(few: Digits, mode: str, how: str, place: str) -> None:
    copies, module, datamodule = Copies(how), fresh(), DigitsData(few)
    callbacks = [] if mode == "plain" else ours(mode)
    seed()
    trainer = quiet_trainer(callbacks=[copies, *callbacks] if place == "before" else [*callbacks, copies], max_epochs=2)
    trainer.fit(module, datamodule=datamodule)
    assert [(hook, epoch) for hook, epoch, *_ in copies.found] == [
        (hook, epoch)
        for epoch in (0, 1)
        for hook in ("on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_train_epoch_end")
    ]
    copies.take("after", trainer, module)
    final = weights(module)
    for _, _, then, its_module, its_callbacks, its_data in copies.found:
        assert_same_weights(then, weights(its_module))
        reference = like(its_module)
        expected = train_plainly(reference, DigitsData(few))
        assert_same_weights(expected, train_plainly(its_module, its_data))
        assert [type(c) for c in its_callbacks] == [type(c) for c in callbacks]
    assert_same_weights(final, weights(module))
    assert_clean(trainer, module)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_a_copy_of_the_module_does_not_keep_the_original(few: Digits, mode: str, how: str) -> None:
    """The best model of each of many runs is kept: not the others, with their trainers and optimizers."""
    with only_new_objects():
        copies, module = Copies(how), fresh()
        callbacks = [] if mode == "plain" else ours(mode)
        trainer = quiet_trainer(callbacks=[*callbacks, copies], max_epochs=2)
        trainer.fit(module, data(few))
        kept = [its_module for _, _, _, its_module, _, _ in copies.found]
        original = weakref.ref(module)
        del copies, module, trainer, callbacks
        gc.collect()
        assert len(kept) == 6
        assert original() is None


@pytest.mark.parametrize(
    ("mode", "controller"), [*((mode, False) for mode in MODES), *((mode, True) for mode in MODES[:3])]
)
def test_a_copy_of_the_callback_made_within_a_fit_starts_as_a_new_one(few: Digits, mode: str, controller: bool) -> None:
    def make() -> list[Any]:
        return ours(mode, seed=3, controller=PIController(kp=0.3) if controller else None)

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 10:
                self.copied = copy.deepcopy(trainer.callbacks[:2])
                self.offered = trainer.callbacks[0].ledger.offered

    copying = Copy()
    quiet_trainer(callbacks=[*make(), copying], max_epochs=2).fit(fresh(), data(few))
    assert copying.copied[0].ledger.offered == copying.offered > 0, "with its books, outside the fit"
    assert copying.copied[0].activation_rate is None
    ends = []
    for callbacks in (make(), copying.copied):
        module = fresh()
        seed()
        quiet_trainer(callbacks=callbacks, max_epochs=2).fit(module, data(few))
        ends.append((weights(module), callbacks[0].ledger.offered, callbacks[0].ledger.selected))
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
