"""The FLOPs in the ledger, against counts over whole steps and by hand."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch.nn.functional as F

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import RowOps
from tests.helpers.data import Digits, loader
from tests.helpers.modules import Lbfgs, Manual, fresh
from tests.helpers.training import BATCH_MODES, fit, half


@pytest.mark.parametrize("rate", [0.4, 0.1])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_flops_counted_over_the_whole_step(digits: Digits, mode: str, rate: float) -> None:
    """The ledger's scaled figure against FlopCounterMode around entire steps, scoring included, of the same run."""
    from torch.utils.flop_counter import FlopCounterMode

    def whole_steps(*callbacks: pl.Callback) -> int:
        with FlopCounterMode(display=False) as counter, RowOps():
            fit(fresh(batchnorm=False), loader(digits, batch_size=128), *callbacks, max_steps=4)
        return counter.get_total_flops()

    callback = SparseSelectionCallback(target_activation_rate=rate, mode=mode)
    share = whole_steps(callback) / whole_steps()
    assert 1 - callback.savings["flops"] == pytest.approx(share, rel=1e-3)
    observed = callback.ledger.selected / callback.ledger.offered
    forward = callback.ledger.flops.forward / callback.ledger.flops.dense
    expected = {"mask": 1.0, "subset": forward + observed, "partial": forward + (1 - forward) * observed}
    assert share == pytest.approx(expected[mode], rel=1e-3)


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_flops_of_a_sample_are_the_same_however_counted(digits: Digits, mode: str) -> None:
    conv, linear = 2 * 9 * 8 * 64, 2 * 8 * 64 * 10
    for warm in (True, False):
        callback = half(mode=mode)
        extra = [TwoStageScheduler(warmup_epochs=1)] if warm else []
        fit(fresh(batchnorm=False), loader(digits), callback, *extra, max_epochs=2)
        assert vars(callback.ledger.flops) == {"forward": conv + linear, "backward": conv + 2 * linear}


def test_flops_with_lbfgs_and_with_two_backwards(digits: Digits) -> None:
    conv, linear = 2 * 9 * 8 * 64, 2 * 8 * 64 * 10

    class TwoBackwards(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(0.5 * loss, retain_graph=True)
            self.manual_backward(0.5 * loss)
            self.optimizers().step()

    for cls, backwards, warm in ((Lbfgs, 1, 0), (Lbfgs, 1, 1), (TwoBackwards, 2, 0)):
        callback = half(mode="mask")
        fit(fresh(cls, batchnorm=False), loader(digits), callback, TwoStageScheduler(warmup_epochs=warm), max_epochs=2)
        expected = {"forward": conv + linear, "backward": backwards * (conv + 2 * linear)}
        assert vars(callback.ledger.flops) == expected
