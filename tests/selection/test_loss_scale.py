"""The scaler of 16-bit training: an overflow is its own affair, and no sample's fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES, fit
from tests.selection.bad_samples import BAD, BadLoss, finite, marked

pytestmark = pytest.mark.filterwarnings("ignore:lightning-ast. NaN or infinity")


@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_a_scale_that_is_too_large_comes_down(digits: Digits, mode: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    selection = SparseSelectionCallback(mode="mask" if mode == "plain" else mode)  # type: ignore[arg-type]
    callbacks = [] if mode == "plain" else [selection, TwoStageScheduler(warmup_epochs=int(mode == "prune"))]
    module = fresh(dropout=0.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(module, loader(digits), *callbacks, plugins=[plugin], max_epochs=2)
    assert finite(module)
    assert scaler.get_scale() < 2.0**26
    assert selection.quarantined == []


class NanByOverflow(PlainNet):
    """A network whose last layer gets the difference of two infinite values where the gradient overflows."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        out = self.net(x)
        if out.requires_grad:
            out.register_hook(lambda g: torch.where(g.abs().amax() > 1e3, torch.full_like(g, torch.nan), g))
        return F.cross_entropy(out.float(), y)


@pytest.mark.parametrize("mode", ["mask", "partial", "prune"])
def test_a_batch_of_nan_at_a_large_scale_is_an_overflow(digits: Digits, mode: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    selection = SparseSelectionCallback(mode=mode)  # type: ignore[arg-type]
    callbacks = [selection, TwoStageScheduler(warmup_epochs=int(mode == "prune"))]
    module = fresh(NanByOverflow)
    fit(module, loader(digits), *callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_epochs=3)
    assert finite(module)
    assert scaler.get_scale() < 2.0**18
    assert selection.quarantined == []


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_of_nan_is_still_a_sample_s(digits: Digits, mode: str) -> None:
    selection = SparseSelectionCallback(mode=mode, quarantine_limit=0.2)  # type: ignore[arg-type]
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    module = fresh(BadLoss)
    fit(module, loader(marked(digits)), selection, TwoStageScheduler(warmup_epochs=1), plugins=[plugin], max_epochs=2)
    assert finite(module)
    found = {s.index if mode == "prune" else 64 * s.batch + s.position for s in selection.quarantined}
    assert found == set(BAD)
