"""``partial`` has the gradients of ``mask`` on the device's own kernels, and computes over the selected rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.testing import PartialBackwardCheck, check_partial_backward

SIZE, CLASSES = 20, 5
CLOSE = {torch.float64: 1e-11, torch.float32: 1e-4}


class Pooled(nn.Module):
    """The mean over all places of a feature map, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(2).mean(2))


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16, padding_idx=0)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False),
        nn.GELU(),
        nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1),
        nn.MaxPool2d(2),
        Pooled(8),
    )


def batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        Pooled(8),
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(8 * 64),
        nn.Linear(8 * 64, 16),
        nn.RMSNorm(16),
        nn.Linear(16, CLASSES),
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": convolutions,
    "norms": norms,
    "embedding": Words,
    "encoder layer": lambda: Encoder(0.0),
}


def data_for(net: nn.Module, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, CLASSES, (SIZE,), device=device)
    if isinstance(net, Words):
        return torch.randint(0, 30, (SIZE, 7), device=device), labels
    shape = (SIZE, 6, 8) if isinstance(net, Recurrent) else (SIZE, 6, 16) if isinstance(net, Encoder) else None
    return torch.randn(shape or (SIZE, 4, 16, 16), device=device, dtype=dtype), labels


def loss(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]).float(), batch[1])


def exact_loss(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def check(make: Callable[[], nn.Module], device: str, dtype: torch.dtype, **options: Any) -> PartialBackwardCheck:
    torch.manual_seed(0)
    net = make().to(device=device, dtype=dtype)
    found = check_partial_backward(net, data_for(net, device, dtype), loss=exact_loss, **options)
    print(found)
    return found


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_layers(name: str, dtype: torch.dtype, device: str) -> None:
    found = check(NETS[name], device, dtype)
    assert found.relative_error < CLOSE[dtype]
    assert found.dense_ops == {}
    assert found.flops_share == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("make", [convolutions, batchnorm])
def test_channels_last(make: Callable[[], nn.Module], device: str) -> None:
    torch.manual_seed(0)
    net = make().to(device).to(memory_format=torch.channels_last)
    x, y = data_for(net, device, torch.float32)
    batch = x.contiguous(memory_format=torch.channels_last), y
    found = check_partial_backward(net, batch, loss=exact_loss)
    print(found)
    assert found.relative_error < CLOSE[torch.float32]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_batchnorm_in_training_mode(dtype: torch.dtype, device: str) -> None:
    """Exact, over all rows from there on; and over the selected rows, near it."""
    exact = check(batchnorm, device, dtype)
    assert exact.relative_error < CLOSE[dtype]
    assert any("batch_norm" in name for name in exact.dense_ops)
    selected = check(batchnorm, device, dtype, batchnorm="selected")
    assert selected.dense_ops == {}
    assert selected.flops_share == pytest.approx(0.4, abs=0.02)
    assert selected.cosine > 0.3


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_batchnorm_in_evaluation_mode(dtype: torch.dtype, device: str) -> None:
    found = check(lambda: batchnorm().eval(), device, dtype)
    assert found.relative_error < CLOSE[dtype]
    assert found.dense_ops == {}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_recurrent_layers_are_exact_and_go_dense_in_cudnn(kind: Any, dtype: torch.dtype, device: str) -> None:
    found = check(lambda: Recurrent(kind), device, dtype)
    assert found.relative_error < CLOSE[dtype]
    if device == "cuda":
        assert any("cudnn_rnn" in name for name in found.dense_ops)
        assert found.flops_share is None


def test_dropout_inside_attention_is_exact(device: str) -> None:
    """On CUDA its kernel draws the mask anew, by the place in the batch: it goes dense, and is right."""
    found = check(lambda: Encoder(0.1), device, torch.float32)
    assert found.relative_error < CLOSE[torch.float32]
    if device == "cuda":
        assert any("attention" in name for name in found.dense_ops)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_autocast(name: str, kind: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]().to(device)

    def scaled(net: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(device, kind):
            return loss(net, batch) * 256.0  # in 16 bits small gradients would become zero

    found = check_partial_backward(net, data_for(net, device, torch.float32), loss=scaled)
    print(found)
    assert found.relative_error < (3e-2 if kind is torch.bfloat16 else 2e-2)
    assert found.dense_ops == {}


def test_tf32(device: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    found = check(convolutions, device, torch.float32)
    assert found.relative_error < 1e-2
    assert found.dense_ops == {}
