"""Global generators and buffers are where the plain run leaves them, whatever the order of the callbacks."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_ast import SparseSelectionCallback, SparseTrainingMonitor
from tests.helpers.data import Digits
from tests.helpers.modules import fresh
from tests.helpers.training import MODES, assert_same_weights, quiet_trainer, weights
from tests.selection.plain_and_ours import AtEpochEnd, Draws, data, ours, random_state, seed


@pytest.mark.parametrize(("mode", "dropout"), [("mask", 0.1), ("partial", 0.1), ("subset", 0.0)])
@pytest.mark.parametrize("gate", ["soft", "topk"])
def test_sparse_steps_draw_from_a_generator_of_their_own(few: Digits, mode: str, dropout: float, gate: str) -> None:
    """``subset`` without dropout, which draws for fewer samples there."""
    ends = []
    for callbacks in ([], [SparseSelectionCallback(mode=mode, gate=gate, target_activation_rate=0.5)]):
        ends.append(AtEpochEnd())
        seed()
        module = fresh(Draws, dropout=dropout)
        quiet_trainer(callbacks=[*callbacks, ends[-1]], max_epochs=2).fit(module, data(few, shuffle=True))
    assert ends[0].random == ends[1].random
    assert any(not torch.equal(t, ends[1].weights[1][n]) for n, t in ends[0].weights[1].items())


class Busy(pl.Callback):
    """Draws from the global generators in its hooks, and reads what the others show."""

    def on_train_batch_start(self, *_: Any) -> None:
        random.random(), np.random.rand(), torch.rand(1)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        torch.rand(1)
        for parameter in module.parameters():
            parameter.grad.mul_(0.5)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        torch.rand(1)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_the_callbacks_does_not_matter(few: Digits, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    ends = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 2, 3, 0), (2, 0, 3, 1), (0, 3, 2, 1), (2, 3, 1, 0)):
        selection, schedule = ours(mode, cooldown=1)
        callbacks = [selection, schedule, Busy(), SparseTrainingMonitor()]
        module = fresh()
        seed()
        trainer = quiet_trainer(callbacks=[callbacks[i] for i in order], max_epochs=3, accumulate_grad_batches=2)
        trainer.fit(module, data(few, shuffle=True))
        ledger = selection.ledger
        ends.append((order, weights(module), random_state(), ledger.offered, ledger.selected, selection.threshold))
    assert ends[0][4] < ends[0][3]
    for _, final, *others in ends[1:]:
        assert_same_weights(ends[0][1], final)
        assert others == list(ends[0][2:])
    assert "Skipped" in capsys.readouterr().out
