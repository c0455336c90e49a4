"""Batches without an end: a step that fails, is interrupted or is skipped leaves nothing behind, the first one included."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet
from tests.helpers.training import MODES, assert_same_weights, quiet_trainer, weights

FAULTS = [
    ("training_step", RuntimeError, 1),
    ("training_step", KeyboardInterrupt, 0),
    ("on_before_backward", KeyboardInterrupt, 1),
    ("on_after_backward", RuntimeError, 0),
    ("on_train_batch_end", RuntimeError, 1),
]


class Fails(PlainNet):
    """Raises an error somewhere in a batch; the step itself fails in the midst of its forward."""

    error: type[BaseException] | None = None
    place, at = "training_step", 0

    def __init__(self) -> None:
        super().__init__(dropout=0.0, batchnorm=False)
        self.net[0].register_forward_hook(lambda *_: self.here("training_step"))

    def here(self, place: str) -> None:
        if self.error is not None and self.training and (place, self.global_step) == (self.place, self.at):
            raise self.error("the user's own")

    def on_before_backward(self, *_: Any) -> None:
        self.here("on_before_backward")

    def on_after_backward(self) -> None:
        self.here("on_after_backward")

    def on_train_batch_end(self, *_: Any) -> None:
        if self.error is not None and self.place == "on_train_batch_end":
            raise self.error("the user's own")


def assert_no_mode_is_left() -> None:
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not torch.overrides._get_current_function_mode_stack()


def spoiled(digits: Digits) -> DataLoader[Any]:
    """Three batches of 16 whose samples are views of one memory; the first has a sample that is not finite."""
    x = digits[0][:48].clone()
    x[3, 0, 2, 2] = math.nan
    return DataLoader([(x[i], digits[1][i]) for i in range(48)], batch_size=16)


@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
@pytest.mark.parametrize(("place", "error", "warmup"), FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_first_batch_that_fails(
    digits: Digits, mode: str, place: str, error: type[BaseException], warmup: int
) -> None:
    """No mode of torch stays active, no batch has other values, and the module trains on as a new one does."""
    seen: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((batch, [leaf.clone() for leaf in batch]))

    module, twin = Fails(), Fails()
    twin.load_state_dict(module.state_dict())
    module.error, module.place = error, place
    schedule = TwoStageScheduler(warmup_epochs=warmup)
    trainer = quiet_trainer(
        callbacks=[Keep(), SparseSelectionCallback(mode=mode, quarantine_limit=0.1), schedule], max_epochs=2
    )
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, spoiled(digits))
    assert_no_mode_is_left()
    assert "training_step" not in vars(module)
    ((batch, before),) = seen
    for leaf, then in zip(batch, before, strict=True):
        assert torch.equal(leaf.nan_to_num(-1), then.nan_to_num(-1))
    module.error = None
    if place in ("training_step", "on_before_backward"):
        ends = []
        for each in (module, twin):
            quiet_trainer(callbacks=[SparseSelectionCallback(mode=mode)], max_epochs=2).fit(each, _plain(digits))
            ends.append(weights(each))
        assert_same_weights(*ends)


def _plain(digits: Digits) -> DataLoader[Any]:
    return DataLoader(torch.utils.data.TensorDataset(digits[0][:48], digits[1][:48]), batch_size=16)


@pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_a_hook_skips(digits: Digits, mode: str) -> None:
    """-1 from `on_train_batch_start` ends the epoch before the first step; the validation behind it sees no mode."""

    class Skips(Fails):
        modes: int | None = None

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.trainer.current_epoch == 0 else None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert_no_mode_is_left()

    data, kept = spoiled(digits), []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            kept.append((batch[0], batch[0].clone()))

    module = Skips()
    callback = SparseSelectionCallback(mode=mode, quarantine_limit=0.1)
    schedule = TwoStageScheduler(warmup_epochs=1)
    quiet_trainer(callbacks=[Keep(), callback, schedule], max_epochs=2).fit(module, data, _plain(digits))
    for leaf, then in kept:
        assert torch.equal(leaf.nan_to_num(-1), then.nan_to_num(-1))
    assert callback.ledger.selected < callback.ledger.offered
