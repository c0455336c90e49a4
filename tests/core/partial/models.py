"""The architectures that partial backward is checked on: small inputs, real depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models as zoo
from torch import Tensor, nn

B = 10
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


def image_net(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(zoo, name)(num_classes=10, **options)


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


Case = tuple[Callable[[], nn.Module], Callable[[], Any], set[str]]
MODELS: dict[str, Case] = {
    "resnet18": (image_net("resnet18"), lambda: images(48), {BATCHNORM, ADD}),
    "resnet50": (image_net("resnet50"), lambda: images(48), {BATCHNORM, ADD}),
    "convnext_tiny": (image_net("convnext_tiny"), lambda: images(48), set()),
    "efficientnet_b0": (image_net("efficientnet_b0"), lambda: images(48), {BATCHNORM}),
    "mobilenet_v3_small": (image_net("mobilenet_v3_small"), lambda: images(48), {BATCHNORM}),
    "densenet121": (image_net("densenet121"), lambda: images(64), {BATCHNORM}),
    "regnet_y_400mf": (image_net("regnet_y_400mf"), lambda: images(48), {BATCHNORM, ADD}),
    "swin_t": (image_net("swin_t"), lambda: images(56), set()),
    "vit_b_16": (image_net("vit_b_16", image_size=32), lambda: images(32), set()),
    "gpt": (GPT, lambda: (torch.randint(0, 50, (B, 12)), torch.randint(0, 50, (B, 12))), set()),
    "lstm": (
        LSTM,
        lambda: (torch.randn(B, 6, 8), torch.randint(0, 10, (B,))),
        {"aten.mkldnn_rnn_layer_backward.default"},
    ),
    "unet": (UNet, lambda: (torch.randn(B, 3, 16, 16), torch.randint(0, 4, (B, 16, 16))), set()),
    "bert": (bert, lambda: (torch.randint(0, 50, (B, 9)), torch.randint(0, 10, (B,))), set()),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = make().train()
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():  # heads that start at zero would pass no gradient on
                p.normal_(std=0.05)
    return module
