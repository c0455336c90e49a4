"""The architectures that partial backward is checked on, small and as published."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck

B = 10
Case = tuple[Callable[[], nn.Module], Callable[[], Any], set[str]]
BATCHNORM = "aten.native_batch_norm_backward.default"
ADD = "aten.add.Tensor"  # a residual branch that arrives behind the dense one


class GPT(nn.Module):
    """Pre-norm blocks, causal attention, tied embedding."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, tokens: int = 50, length: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.embedding, self.position = nn.Embedding(tokens, width), nn.Parameter(0.1 * torch.randn(1, length, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in block["qkv"](block["norm1"](x)).chunk(3, -1)
            )
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + block["mlp"](block["norm2"](x))
        return self.norm(x) @ self.embedding.weight.T


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU())

        self.down1, self.down2, self.bottom = block(3, 8), block(8, 16), block(16, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.last, self.head = block(16, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = b + F.interpolate(self.bottom(F.avg_pool2d(b, 2)), scale_factor=2, mode="bilinear")
        return self.head(self.last(torch.cat([a, self.up(c)], 1)))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 16, 2, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def bert() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, num_labels=10, **sizes)

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.BertForSequenceClassification(config)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens, attention_mask=(tokens > 3).long()).logits

    return Bert()


def published(name: str, size: int, dense: set[str], **options: Any) -> Case:
    """Return a network of torchvision with the images for it."""
    return lambda: getattr(zoo, name)(num_classes=10, **options), lambda: images(size), dense


def images(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 3, size, size), torch.randint(0, 10, (B,))


def class_losses(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Per sample: over the tokens or pixels where there are several."""
    x, y = batch
    scores = module(x)
    if y.dim() == 2:
        return F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)
    losses = F.cross_entropy(scores, y, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def resnet() -> nn.Module:
    return zoo.ResNet(BasicBlock, [1, 1, 1, 2], num_classes=10)


def bottlenecks() -> nn.Module:
    return zoo.ResNet(Bottleneck, [1, 1, 1, 2], num_classes=10, width_per_group=8)


def convnext() -> nn.Module:
    return zoo.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=10)


def efficientnet() -> nn.Module:
    make = partial(MBConvConfig, width_mult=1.0, depth_mult=1.0)
    return zoo.EfficientNet([make(1, 3, 1, 16, 16, 1), make(6, 5, 2, 16, 24, 2)], 0.2, num_classes=10)


def mobilenet() -> nn.Module:
    make = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        make(16, 3, 16, 16, True, "RE", 2),
        make(16, 5, 64, 24, True, "HS", 2),
        make(24, 5, 96, 24, True, "HS", 1),
    ]
    return zoo.MobileNetV3(blocks, last_channel=64, num_classes=10)


def densenet() -> nn.Module:
    return zoo.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=10)


def regnet() -> nn.Module:
    widths = BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return zoo.RegNet(widths, num_classes=10)


def swin() -> nn.Module:
    return zoo.SwinTransformer([4, 4], 24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10)


def vit() -> nn.Module:
    return zoo.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10)


def small_images() -> tuple[Tensor, Tensor]:
    return images(32)


RESNET = {BATCHNORM, ADD}
MODELS: dict[str, Case] = {
    "resnet": (resnet, lambda: images(48), RESNET),
    "bottlenecks": (bottlenecks, lambda: images(48), RESNET),
    "convnext": (convnext, small_images, set()),
    "efficientnet": (efficientnet, small_images, {BATCHNORM}),
    "mobilenet": (mobilenet, small_images, {BATCHNORM}),
    "densenet": (densenet, small_images, {BATCHNORM}),
    "regnet": (regnet, small_images, RESNET),
    "swin": (swin, small_images, set()),
    "vit": (vit, small_images, set()),
    "gpt": (GPT, lambda: (torch.randint(0, 50, (B, 12)), torch.randint(0, 50, (B, 12))), set()),
    "lstm": (
        LSTM,
        lambda: (torch.randn(B, 6, 8), torch.randint(0, 10, (B,))),
        {"aten.mkldnn_rnn_layer_backward.default"},
    ),
    "unet": (UNet, lambda: (torch.randn(B, 3, 16, 16), torch.randint(0, 4, (B, 16, 16))), set()),
    "bert": (bert, lambda: (torch.randint(0, 50, (B, 9)), torch.randint(0, 10, (B,))), set()),
}
"""Networks of few and narrow layers, of every kind of layer that the published ones have."""

PUBLISHED: dict[str, Case] = {
    "resnet18": published("resnet18", 48, RESNET),
    "resnet50": published("resnet50", 48, RESNET),
    "convnext_tiny": published("convnext_tiny", 48, set()),
    "efficientnet_b0": published("efficientnet_b0", 48, {BATCHNORM}),
    "mobilenet_v3_small": published("mobilenet_v3_small", 48, {BATCHNORM}),
    "densenet121": published("densenet121", 64, {BATCHNORM}),
    "regnet_y_400mf": published("regnet_y_400mf", 48, RESNET),
    "swin_t": published("swin_t", 56, set()),
    "vit_b_16": published("vit_b_16", 32, set(), image_size=32),
}
"""Networks of torchvision at their published depth and width."""


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make().train()
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():  # heads that start at zero would pass no gradient on
                p.normal_(std=0.05)
    return module
