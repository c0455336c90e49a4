"""Trainers of every kind, fits that follow each other, and fits that fail: nothing is left on module and trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from lightning_ast import SparseSelectionCallback
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, assert_same_weights, quiet_trainer, weights
from tests.selection.plain_and_ours import Quiet, assert_clean, data, like, ours, random_state, seed

KINDS: dict[str, tuple[dict[str, Any], Any, int]] = {  # options, other callbacks, optimizer steps of the plain run
    "fast_dev_run": ({"fast_dev_run": True}, lambda: [], 1),
    "overfit_batches": ({"overfit_batches": 2}, lambda: [], 6),
    "one batch": ({"limit_train_batches": 1}, lambda: [], 3),
    "barebones": ({"barebones": True}, lambda: [], 24),
    "anomaly": ({"detect_anomaly": True}, lambda: [], 24),
    "clipped": ({"gradient_clip_val": 0.1}, lambda: [], 24),
    "averaged": ({}, lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1)], 25),
    "stopped early": ({}, lambda: [EarlyStopping("val_loss", patience=0, min_delta=10.0)], 16),
    "checkpoints": ({"enable_checkpointing": True}, lambda: [ModelCheckpoint(monitor="val_loss", save_top_k=2)], 24),
}


def run_kind(kind: str, few: Digits, callbacks: list[Any], tmp_path: Path) -> tuple[pl.Trainer, PlainNet]:
    options, others, _ = KINDS[kind]
    options = {"max_epochs": 3, "default_root_dir": tmp_path, **options}
    seed()
    module = fresh(Quiet)
    if kind == "barebones":
        options = {"barebones": True, "max_epochs": 3, "accelerator": "cpu", "devices": 1}
        trainer = pl.Trainer(**options, callbacks=callbacks)
    else:
        trainer = quiet_trainer(**options, callbacks=[*callbacks, *others()])
    shuffle = kind != "overfit_batches"
    with warnings.catch_warnings():
        for message in (
            "Swapping scheduler",
            "SWA is currently",
            ".*barebones",
            ".*anomaly",
            "You requested to overfit",
        ):
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, data(few, shuffle=shuffle), data(few))
    return trainer, module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [pytest.param("mask", marks=pytest.mark.slow), *MODES[1:]])
def test_trainers_of_all_kinds(few: Digits, mode: str, kind: str, tmp_path: Path) -> None:
    """At a rate of 1, and where every epoch is dense, the plain run, bitwise; at a lower rate a sparse one."""
    plain_trainer, plain = run_kind(kind, few, [], tmp_path / "plain")
    assert plain_trainer.global_step == KINDS[kind][2]
    after = random_state()
    whole = SparseSelectionCallback(mode=mode, target_activation_rate=1.0)
    trainer, module = run_kind(kind, few, [whole], tmp_path / "whole")
    assert_same_weights(weights(plain), weights(module))
    assert after == random_state()
    assert trainer.global_step == plain_trainer.global_step
    assert vars(module).keys() == vars(plain).keys()
    assert_clean(trainer, module)

    selection, *schedule = ours(mode)
    trainer, module = run_kind(kind, few, [selection, *schedule], tmp_path / "sparse")
    assert_clean(trainer, module)
    assert all(bool(t.isfinite().all()) for t in weights(module).values())
    assert trainer.current_epoch == plain_trainer.current_epoch
    if mode != "prune":
        assert trainer.global_step == plain_trainer.global_step
    assert selection.stage == "sparse" or kind == "averaged", "which adds an epoch that is not trained on"
    assert selection.ledger.selected < selection.ledger.offered
    if kind == "checkpoints":
        (keeper,) = (c for c in trainer.callbacks if isinstance(c, ModelCheckpoint))
        best = torch.load(keeper.best_model_path, weights_only=True)
        restored = fresh(Quiet)
        restored.load_state_dict(best["state_dict"])
        (metrics,) = quiet_trainer().validate(restored, data(few), verbose=False)
        assert metrics["val_loss"] == pytest.approx(float(keeper.best_model_score), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*max_epochs=0")
def test_no_epoch(few: Digits, mode: str) -> None:
    module = fresh()
    before = weights(module)
    trainer = quiet_trainer(callbacks=[SparseSelectionCallback(mode=mode)], max_epochs=0)
    trainer.fit(module, data(few))
    assert_same_weights(before, weights(module))
    assert_clean(trainer, module)
    assert trainer.callbacks[0].ledger.offered == 0
    assert module.seen == []


class NoMomentum(PlainNet):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_two_fits_are_one_longer_fit(few: Digits, mode: str) -> None:
    """Where the optimizer keeps nothing, which Lightning makes anew, and no stage depends on the length of the run."""
    runs = []
    for lengths in ([4], [2, 4]):
        module = fresh(NoMomentum, dropout=0.0)
        trainer = quiet_trainer(callbacks=[] if mode == "plain" else ours(mode), max_epochs=lengths[0])
        for length in lengths:
            trainer.fit_loop.max_epochs = length
            trainer.fit(module, data(few))
            assert_clean(trainer, module)
        ledgers = [callback.ledger for callback in trainer.callbacks[:1]]
        runs.append((weights(module), [(ledger.offered, ledger.selected) for ledger in ledgers]))
    assert_same_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


class Fails(pl.Callback):
    def __init__(self, hook: str, error: type[BaseException], at: int) -> None:
        self.error, self.at = error, at
        setattr(self, hook, self.fail)

    def fail(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.at and not trainer.sanity_checking:
            raise self.error("the user's own")


@pytest.mark.parametrize(
    ("hook", "at", "place", "error"),
    [
        ("on_train_batch_start", 9, "before", RuntimeError),
        ("on_train_batch_start", 9, "after", KeyboardInterrupt),
        ("on_before_backward", 9, "after", RuntimeError),
        ("on_after_backward", 9, "before", KeyboardInterrupt),
        ("on_before_optimizer_step", 9, "after", RuntimeError),
        ("on_validation_start", 9, "after", RuntimeError),
        ("on_train_batch_end", 3, "before", KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_fit_that_fails_leaves_all_clean(
    few: Digits, mode: str, hook: str, at: int, place: str, error: type[BaseException]
) -> None:
    """And the same module and the same callback train on as new ones with the same weights."""
    module, callbacks = fresh(), ours(mode)
    fails = Fails(hook, error, at)
    trainer = quiet_trainer(
        callbacks=[fails, *callbacks] if place == "before" else [*callbacks, fails],
        max_epochs=3,
        val_check_interval=0.5,
    )
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, data(few), data(few))
    assert_clean(trainer, module)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not torch.overrides._get_current_function_mode_stack()
    ends = []
    for one, its_callbacks in ((like(module), ours(mode)), (module, callbacks)):
        seed()
        again = quiet_trainer(callbacks=its_callbacks, max_epochs=2)
        again.fit(one, data(few))
        ends.append((weights(one), its_callbacks[0].ledger.offered, its_callbacks[0].ledger.selected))
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]
