"""Validation, test and prediction around and within a sparse fit are those of a plain trainer."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.data import Digits
from tests.helpers.modules import fresh
from tests.helpers.training import MODES, assert_same_weights, quiet_trainer, weights
from tests.selection.plain_and_ours import Draws, assert_clean, data, ours, random_state, seed


class Evaluated(Draws):
    """Also tests and predicts; a random number takes part, so that a generator that was moved is seen."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.unpack(batch)
        self.log("val_loss", F.cross_entropy(self(x + 0.01 * torch.rand_like(x)), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.unpack(batch)
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]) + torch.rand(())


def evaluate(trainer: pl.Trainer, module: pl.LightningModule, few: Digits) -> list[Any]:
    seed(7)
    values: list[Any] = [getattr(trainer, do)(module, data(few), verbose=False) for do in ("validate", "test")]
    return [*values, torch.cat(trainer.predict(module, data(few))).tolist(), random_state()]


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_before_between_and_after_fits(few: Digits, mode: str) -> None:
    module = fresh(Evaluated)
    trainer = quiet_trainer(callbacks=ours(mode), max_epochs=2)

    def check() -> None:
        plain = fresh(Evaluated)
        plain.load_state_dict(module.state_dict())
        plain.drawn = getattr(module, "drawn", 0.0)
        assert evaluate(quiet_trainer(), plain, few) == evaluate(trainer, module, few)
        assert_clean(trainer, module)

    check()
    trainer.fit(module, data(few))
    check()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data(few))
    assert trainer.callbacks[0].ledger.selected < trainer.callbacks[0].ledger.offered
    check()


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_within_a_fit(few: Digits, mode: str) -> None:
    """Every validation, twice an epoch, is that of the weights of the moment."""
    seen: list[tuple[dict[str, Tensor], Any, float]] = []

    class Spy(pl.Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            self.start = weights(module), torch.get_rng_state()

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append((*self.start, trainer.callback_metrics["val_loss"].item()))
                assert_same_weights(self.start[0], weights(module))

    trainer = quiet_trainer(callbacks=[Spy(), *ours(mode)], max_epochs=2, val_check_interval=0.5)
    trainer.fit(fresh(Evaluated), data(few), data(few))
    assert len(seen) == 4
    assert trainer.callbacks[1].ledger.selected < trainer.callbacks[1].ledger.offered
    for then, generator, value in seen:
        plain = fresh(Evaluated)
        plain.load_state_dict(then)
        loaded = data(few)

        class Replay(pl.Callback):
            def on_validation_start(self, trainer: Any, module: Any, generator: Any = generator) -> None:
                torch.set_rng_state(generator)

        (metrics,) = quiet_trainer(callbacks=[Replay()]).validate(plain, loaded, verbose=False)
        assert metrics["val_loss"] == value
