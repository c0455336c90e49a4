"""The scaler of 16-bit training: an overflow is its own affair, and no sample's fault."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import fresh
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


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_of_nan_is_still_a_sample_s(digits: Digits, mode: str) -> None:
    selection = SparseSelectionCallback(mode=mode, quarantine_limit=0.2)  # type: ignore[arg-type]
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    module = fresh(BadLoss)
    fit(module, loader(marked(digits)), selection, TwoStageScheduler(warmup_epochs=1), plugins=[plugin], max_epochs=2)
    assert finite(module)
    found = {s.index if mode == "prune" else 64 * s.batch + s.position for s in selection.quarantined}
    assert found == set(BAD)
