"""Samples that are not finite, on the device: left out, counted when the news arrives, and too many stop the run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_ast.errors import QuarantineError
from tests.gpu.runs import callbacks_of, finite, train
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import BATCH_MODES, MODES
from tests.selection.bad_samples import BAD, BadLoss, marked, spoiled


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_a_bad_input_is_left_out_in_each_epoch(
    digits: Digits, device: str, mode: str, stage: str, value: float
) -> None:
    module = fresh()
    callbacks = callbacks_of(mode, warmup=int(stage == "warmup"))
    trainer = train(module, spoiled(digits, value), device, *callbacks, max_epochs=2, log_every_n_steps=1)
    assert finite(module)
    found = callbacks[0].quarantined
    assert [64 * sample.batch + sample.position for sample in found] == BAD * 2
    assert [sample.epoch for sample in found] == [0] * 3 + [1] * 3
    assert trainer.callback_metrics["ast/quarantined"] == 3


def test_prune_leaves_a_bad_input_out_until_a_dense_epoch(digits: Digits, device: str) -> None:
    module = fresh()
    callbacks = callbacks_of("prune")
    train(module, spoiled(digits), device, *callbacks, max_epochs=3)
    assert finite(module)
    assert [(sample.epoch, sample.index) for sample in callbacks[0].quarantined] == [(0, index) for index in BAD]


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_goes_bad_in_mid_run(digits: Digits, device: str, mode: str) -> None:
    """On finite inputs; the sparse steps leave it out."""

    class Later(BadLoss):
        def losses(self, batch: Any) -> Any:
            if self.trainer.current_epoch == 0:
                return self(batch[0].clamp(max=1)), batch[1]
            return super().losses(batch)

    module = fresh(Later)
    callbacks = callbacks_of(mode, quarantine_limit=0.2)
    train(module, marked(digits), device, *callbacks, max_epochs=3)
    assert finite(module)
    found = {s.index if mode == "prune" else 64 * s.batch + s.position for s in callbacks[0].quarantined}
    assert found <= set(BAD)
    assert all(sample.epoch > 0 for sample in callbacks[0].quarantined)
    if mode != "prune":
        assert found == set(BAD)


@pytest.mark.parametrize("mode", MODES)
def test_more_than_the_limit_stops_the_run(digits: Digits, device: str, mode: str) -> None:
    bad = [1, 65, 130, 195, 260, 325, 390]
    callbacks = callbacks_of(mode)
    with pytest.raises(QuarantineError, match=r"more than quarantine_limit=0\.01 of its 512"):
        train(fresh(PlainNet), spoiled(digits, where=bad), device, *callbacks, max_epochs=2)
    assert 6 <= len(callbacks[0].quarantined) <= 7
