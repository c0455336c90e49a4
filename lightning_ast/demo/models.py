"""Two small networks, and an ordinary LightningModule around them that knows nothing of sparse training."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["ImageClassifier", "ResNet9", "SimpleCNN", "one_cycle"]


def _conv(channels_in: int, channels_out: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def one_cycle(
    module: pl.LightningModule,
    optimizer: torch.optim.Optimizer,
    *,
    rises: float = 0.1,
    anneal: Literal["cos", "linear"] = "cos",
) -> Any:
    """Return what ``configure_optimizers`` returns: one cycle of the learning rate that ends with the run.

    Args:
        module: The module, whose trainer knows the length of the run.
        optimizer: The optimizer, with the highest learning rate of the cycle.
        rises: The share of the steps in which the learning rate rises, in (0, 1).
        anneal: The form of the rise and the fall.
    """
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=rises if rises * steps > 1 else 0.0,  # torch divides by zero at one step
        anneal_strategy=anneal,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ImageClassifier(pl.LightningModule):
    """Cross-entropy, SGD with Nesterov momentum and a one-cycle schedule: plain Lightning code.

    Args:
        net: The network, from ``(B, C, H, W)`` to class scores ``(B, num_classes)``.
        num_classes: The number of classes.
        lr: The highest learning rate of the cycle.
        weight_decay: The L2 penalty.
        warmup_share: The share of the steps in which the learning rate rises, in (0, 1).
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        lr: float = 0.2,
        weight_decay: float = 5e-4,
        warmup_share: float = 0.25,
    ) -> None:
        super().__init__()
        self.net = net
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_share = warmup_share
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(B, num_classes)``."""
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log accuracy and loss."""
        images, labels = batch
        scores = self(images)
        self.val_acc(scores, labels)
        self.log("val_loss", F.cross_entropy(scores, labels), sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        """Make an optimizer and one cycle over the whole run."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )
        return one_cycle(self, optimizer, rises=self.warmup_share, anneal="linear")


class SimpleCNN(ImageClassifier):
    """Three convolutions with pooling and a two-layer classifier: the original laptop run's kind of network."""

    def __init__(
        self, in_channels: int = 3, image_size: int = 32, width: int = 32, lr: float = 0.05, weight_decay: float = 5e-4
    ) -> None:
        layers: list[nn.Module] = []
        for previous, channels in ((in_channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(previous, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        flat = 4 * width * (image_size // 8) ** 2
        head = (nn.Flatten(), nn.Linear(flat, 256), nn.ReLU(), nn.Dropout(0.25), nn.Linear(256, 10))
        super().__init__(nn.Sequential(*layers, *head), lr=lr, weight_decay=weight_decay)
        self.save_hyperparameters()


class ResNet9(ImageClassifier):
    """ResNet-9: eight convolutions in two residual stages and a linear layer.

    Source: D. Page, How to train your ResNet (2018), the DAWNBench CIFAR-10 network.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, lr: float = 0.2, weight_decay: float = 5e-4) -> None:
        net = nn.Sequential(
            _conv(in_channels, width),
            _conv(width, 2 * width, pool=True),
            _Residual(2 * width),
            _conv(2 * width, 4 * width, pool=True),
            _conv(4 * width, 8 * width, pool=True),
            _Residual(8 * width),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, 10, bias=False),
            _Scale(0.125),
        )
        super().__init__(net, lr=lr, weight_decay=weight_decay)
        self.save_hyperparameters()
