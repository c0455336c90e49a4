"""The most memory of a steady sparse step, where activations are what fills the device, against a dense step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.gpu.runs import accelerator_of
from tests.helpers.modules import Trained
from tests.helpers.training import MODES, fit

MOST = 1.1
MOST_OF_EXACT_BATCHNORM = 1.2
STEADY = 2
"""The batch from which on a stage is looked at."""


class Images(Trained):
    """A convolutional net with far more activations than parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for before in (3, 32, 32, 32):
            parts += [nn.Conv2d(before, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
        self.net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Peak(pl.Callback):
    """The most bytes that were allocated in the last epoch, from a few batches behind its first on."""

    def __init__(self) -> None:
        self.batches = 0
        self.bytes = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1 and batch_idx == STEADY and torch.cuda.is_available():
            gc.collect()
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.batches += 1
        if trainer.current_epoch == trainer.max_epochs - 1 and torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()


def peak(device: str, *callbacks: pl.Callback) -> Peak:
    """Two epochs; the peak is that of the second, without what earlier tests have left."""
    size, batch, batches = (96, 128, 12) if device == "cuda" else (8, 8, 12)
    images = torch.rand(batch * batches, 3, size, size)
    data = DataLoader(TensorDataset(images, torch.randint(0, 10, (len(images),))), batch_size=batch)
    gc.collect()
    left = torch.cuda.memory_allocated() if device == "cuda" else 0
    found = Peak()
    fit(Images(), data, *callbacks, found, max_epochs=2, accelerator=accelerator_of(device))
    found.bytes -= left
    return found


def selection(mode: str, **options: Any) -> list[pl.Callback]:
    return [
        SparseSelectionCallback(mode=mode, target_activation_rate=0.4, gate="topk", **options),
        TwoStageScheduler(warmup_epochs=1),
    ]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *((mode, {}) for mode in MODES if mode != "prune"),
        ("partial", {"batchnorm": "exact"}),
        *(("prune", {"prune_steps": steps}) for steps in ("keep", "follow", "replan")),
    ],
    ids=str,
)
def test_peak(mode: str, options: Any, device: str, record_property: Callable[[str, object], None]) -> None:
    dense = peak(device)
    sparse = peak(device, *selection(mode, **options))
    assert dense.batches == 24
    if device == "cpu":
        pytest.skip("memory is measured on CUDA")
    share = sparse.bytes / dense.bytes
    record_property("peak_share", share)
    print(f"{mode} {options}: {sparse.bytes / 2**20:.0f} MiB, {share:.2f} of dense")
    assert dense.bytes > 500 * 2**20, "activations fill the memory"
    assert share <= (MOST_OF_EXACT_BATCHNORM if options.get("batchnorm") == "exact" else MOST)
