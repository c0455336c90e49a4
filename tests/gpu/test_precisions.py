"""Whole runs in each precision: ``partial`` trains as ``mask`` does, and what the fp16 scaler does changes no score."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_ast import SparseSelectionCallback
from tests.gpu.runs import callbacks_of, distance, finite, train
from tests.helpers.data import Digits
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import MODES

START = 1024.0
"""A scale at which no gradient of these networks overflows."""


def half_precision(device: str, scale: float = START) -> tuple[MixedPrecision, Any]:
    """Lightning's ``16-mixed`` with a scaler that begins at a given scale."""
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    return MixedPrecision("16-mixed", device, scaler=scaler), scaler


@pytest.mark.parametrize(
    ("precision", "steps", "close"),
    [("64-true", 3, 1e-9), ("32-true", 3, 1e-3), ("bf16-mixed", 1, 5e-2), ("16-mixed", 1, 2e-2)],
)
def test_partial_trains_as_mask(digits: Digits, device: str, precision: str, steps: int, close: float) -> None:
    data = (digits[0].double(), digits[1]) if precision == "64-true" else digits
    trained = []
    for mode in ("mask", "partial"):
        module = fresh(dropout=0.0)
        options = {"plugins": [half_precision(device)[0]]} if precision == "16-mixed" else {"precision": precision}
        train(module, data, device, *callbacks_of(mode, warmup=0, batchnorm="exact"), max_steps=steps, **options)
        trained.append(module.double())
    apart = distance(*trained, dropout=0.0)
    print(f"{precision}: {apart:.1e} apart")
    assert apart < close


def test_partial_trains_as_mask_in_tf32(digits: Digits, device: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    trained = []
    for mode in ("mask", "partial"):
        trained.append(fresh(dropout=0.0))
        train(trained[-1], digits, device, *callbacks_of(mode, warmup=0, batchnorm="exact"), max_steps=1)
    assert distance(*trained, dropout=0.0) < 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_scores_are_those_of_full_precision(digits: Digits, device: str, mode: str) -> None:
    """The threshold is in the units of the loss, not in those of the scaled loss."""
    thresholds = []
    for half in (False, True):
        callbacks = callbacks_of(mode, warmup=int(mode == "prune"))
        options = {"plugins": [half_precision(device)[0]]} if half else {}
        train(fresh(dropout=0.0), digits, device, *callbacks, max_epochs=1 + (mode == "prune"), **options)
        thresholds.append(callbacks[0].threshold)
    print(f"{mode}: thresholds {thresholds}")
    assert thresholds[1] == pytest.approx(thresholds[0], rel=0.1)


class Overflows(PlainNet):
    """In one step a gradient within the network becomes infinite; the rows where it enters the network are finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        hidden = self.net[:-1](x)
        if self.trainer.global_step == 3 and hidden.requires_grad:  # it does not in a scoring pass
            hidden.register_hook(lambda gradient: gradient * torch.inf)
        return F.cross_entropy(self.net[-1](hidden), y)


class Steps(pl.Callback):
    """Whether the weights moved, step by step."""

    def __init__(self) -> None:
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.before = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.moved.append(any(not torch.equal(a, b) for a, b in zip(self.before, module.parameters(), strict=True)))


@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_the_scaler_skips_a_step_that_overflows(digits: Digits, device: str, mode: str) -> None:
    """And no sample is blamed for it."""
    module = fresh(Overflows, dropout=0.0)
    plugin, scaler = half_precision(device)
    steps = Steps()
    callbacks = callbacks_of(mode, warmup=int(mode == "prune"))
    train(module, digits, device, *callbacks, steps, plugins=[plugin], max_epochs=1 + (mode == "prune"))
    assert finite(module)
    assert [i for i, moved in enumerate(steps.moved) if not moved] == [3]
    assert scaler.get_scale() == START / 2
    if mode != "plain":
        assert callbacks[0].quarantined == []


@pytest.mark.parametrize("mode", ["plain", *MODES])
def test_a_scale_that_is_too_large_comes_down(digits: Digits, device: str, mode: str) -> None:
    """Where the gradient overflows in the first place, at the outputs: the samples are good, the scale is not."""
    module = fresh(dropout=0.0)
    plugin, scaler = half_precision(device, 2.0**30)
    callbacks = callbacks_of(mode, warmup=int(mode == "prune"), gate="soft")
    train(module, digits, device, *callbacks, plugins=[plugin], max_epochs=6)
    assert finite(module)
    assert scaler.get_scale() < 2.0**25
    if mode != "plain":
        assert callbacks[0].quarantined == []


def test_lightnings_own_scaler_under_16_mixed(digits: Digits, cuda: str) -> None:
    """As a user asks for it."""
    module = fresh()
    callback = SparseSelectionCallback(target_activation_rate=0.4)
    train(module, digits, cuda, callback, precision="16-mixed", max_epochs=2)
    assert finite(module)
    assert callback.quarantined == []
