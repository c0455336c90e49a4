"""A run with the callbacks beside the plain one: the same data, seeds, generators, and nothing left behind."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loops import _FitLoop
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from tests.helpers.data import Digits, loader
from tests.helpers.modules import PlainNet, fresh
from tests.helpers.training import weights

__all__ = [
    "BATCH",
    "AtEpochEnd",
    "DigitsData",
    "Draws",
    "Quiet",
    "assert_clean",
    "data",
    "like",
    "only_new_objects",
    "ours",
    "random_state",
    "seed",
]

BATCH = 16


def ours(mode: str, *, warmup: Any = 1, cooldown: Any = 0, **options: Any) -> list[Any]:
    """The selection first, the schedule behind it."""
    selection = SparseSelectionCallback(**{"mode": mode, "target_activation_rate": 0.5, **options})
    return [selection, TwoStageScheduler(warmup_epochs=warmup, cooldown_epochs=cooldown)]


def data(few: Digits, **options: Any) -> Any:
    return loader(few, **{"batch_size": BATCH, **options})


def seed(value: int = 1) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def assert_clean(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Nothing of the callback is left on either."""
    assert not {"training_step", "per_sample_loss", "log", "log_dict"} & set(vars(module))
    assert type(trainer) is pl.Trainer
    assert type(trainer.fit_loop) is _FitLoop


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Collections that look at nothing older."""
    gc.collect()
    gc.freeze()  # for good: to thaw them would bring back all that was frozen before the first test
    yield


class Draws(PlainNet):
    """Draws from every global generator in each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        self.drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))
        loss = F.cross_entropy(self(x * (1 + 0.1 * self.drawn)), y)
        self.log("train_loss", loss)
        return loss


class AtEpochEnd(pl.Callback):
    """Weights with buffers, moments and generators at the end of each epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.random: list[Any] = []
        self.momenta: list[list[Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.weights.append(weights(module))
        self.random.append(random_state())
        state = trainer.optimizers[0].state.values()
        self.momenta.append([s["momentum_buffer"].clone() for s in state if "momentum_buffer" in s])


class DigitsData(pl.LightningDataModule):
    """What a user writes; with the attribute that the batch size finder wants."""

    def __init__(self, few: Digits, batch_size: int = BATCH) -> None:
        super().__init__()
        self.few, self.batch_size = few, batch_size

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*self.few), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*self.few), 2 * self.batch_size)


def like(module: PlainNet) -> PlainNet:
    """A new module with the same weights, each part of it in the same mode: a fit does not switch to training."""
    new = fresh(type(module))
    new.load_state_dict(module.state_dict())
    for part, original in zip(new.modules(), module.modules()):
        part.training = original.training
    return new


class Quiet(PlainNet):
    """Logs nothing while it trains."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        return F.cross_entropy(self(x), y)
