"""How often a step waits for the device: never in the warmup, and a fixed few times where a batch is selected from."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.gpu.runs import Mlp, callbacks_of, train
from tests.helpers.data import Digits, loader
from tests.helpers.modules import fresh
from tests.helpers.training import MODES

BATCH = 16
STEADY = range(6, 13)
"""The batches of an epoch that are looked at: all is settled, and the end of the epoch is not in sight."""
MOST = 2
"""The waits of a sparse step. One is needed: the scores come to the host, which selects."""


class Counts(pl.Callback):
    """Where steps waited for the device, by epoch, from the start of one to that of another; torch warns there."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self.caught = caught
        self.looked_at = 0
        self.places: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEADY.start:
            self.caught.clear()
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("warn")
        elif batch_idx == STEADY.stop:
            self.looked_at += 1
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            waits = [each for each in self.caught if "synchronizing CUDA operation" in str(each.message)]
            self.places[trainer.current_epoch] += Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)

    def per_step(self, epoch: int) -> float:
        return self.places[epoch].total() / len(STEADY)


def waits(digits: Digits, device: str, mode: str) -> Counts:
    """One dense and one sparse epoch: 32 batches each, half as many in a pruned one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = Counts(caught)
        data = loader(digits, batch_size=BATCH, pin_memory=device == "cuda")
        callbacks = [counts, *callbacks_of(mode)]
        train(fresh(Mlp), digits, device, *callbacks, data=data, max_epochs=2, log_every_n_steps=1000)
    assert counts.looked_at == 2
    return counts


@pytest.fixture(scope="module")
def plain(digits: Digits) -> Counts:
    return waits(digits, "cuda" if torch.cuda.is_available() else "cpu", "plain")


@pytest.mark.parametrize("mode", MODES)
def test_waits_of_a_steady_step(
    digits: Digits, device: str, mode: str, plain: Counts, record_property: Callable[[str, object], None]
) -> None:
    found = waits(digits, device, mode)
    for name, counts in (("plain", plain), (mode, found)):
        for epoch, stage in enumerate(("warmup", "sparse")):
            record_property(f"{name}_{stage}_waits_per_step", counts.per_step(epoch))
            print(f"{name}, {stage}: {counts.per_step(epoch):g} waits a step, {dict(counts.places[epoch])}")
    warm, sparse = (found.per_step(epoch) - plain.per_step(epoch) for epoch in (0, 1))
    assert warm <= 0, found.places[0]
    assert sparse <= MOST, found.places[1]


def test_the_instrument_sees_a_wait(digits: Digits, cuda: str) -> None:
    class Waits(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            outputs["loss"].item()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = Counts(caught)
        data = loader(digits, batch_size=BATCH, pin_memory=True)
        train(fresh(Mlp), digits, cuda, counts, Waits(), data=data, max_epochs=1, log_every_n_steps=1000)
    assert counts.per_step(0) >= 1
