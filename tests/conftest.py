"""Shared pieces: real images, ordinary modules, a quiet Trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.demo.data import load_images

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one test process on each core: threads of torch's own would get in each other's way
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """512 real handwritten digits, ``(512, 1, 8, 8)`` in [0, 1], and their labels."""
    images = load_images("digits")
    return images.train_images[:512].float() / 255, images.train_labels[:512]


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """Else the tests share torch.compile's limit of recompilations, behind which it runs uncompiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    """Else ``seed_everything`` of one test sets the order of the samples of a later one (Lightning's PL_GLOBAL_SEED)."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


class PlainNet(pl.LightningModule):
    """What a user writes who has never heard of sparse training. BatchNorm and dropout included."""

    def __init__(self, dropout: float = 0.1, batchnorm: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8) if batchnorm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(8 * 64, 10),
        )
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        return (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch[0], batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        if torch.is_grad_enabled():
            self.seen.append(len(x))
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.unpack(batch)
        scores = self(x)
        self.log("val_loss", F.cross_entropy(scores, y))
        self.log("val_acc", (scores.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def plain_net() -> type[PlainNet]:
    return PlainNet


def loader(digits: tuple[Tensor, Tensor], *, kind: str = "tuple", batch_size: int = 64, **options: Any) -> DataLoader:
    """A real DataLoader whose batches are tuples, lists or dicts."""

    def collate(rows: list[tuple[Tensor, Tensor]]) -> Any:
        x, y = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
        return {"tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": y}}[kind]

    return DataLoader(TensorDataset(*digits), batch_size=batch_size, collate_fn=collate, **options)


def quiet_trainer(**options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
    }
    return pl.Trainer(**{**defaults, **options})


def gloo() -> DDPStrategy:
    """Forked processes that talk through gloo; one that hangs fails after two minutes."""
    return DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=120))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
