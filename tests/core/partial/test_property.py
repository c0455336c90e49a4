"""Random small networks of the supported layers, random selections: always exact masking's gradient, never dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.core.partial.oracle import compare
from tests.core.partial.test_rules import MHA, Attend, Fn, SqueezeExcite

C = 8


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out + x if out.shape == x.shape else out


VECTOR: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(C, C), lambda: nn.LayerNorm(C), lambda: nn.RMSNorm(C), nn.GELU, nn.SiLU, nn.Softplus,
    lambda: nn.Dropout(0.2), lambda: nn.BatchNorm1d(C).eval(), lambda: nn.Softmax(-1),
    lambda: Residual(nn.Sequential(nn.Linear(C, 3), nn.ReLU(), nn.Linear(3, C))),
    lambda: Fn(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1)), lambda: Fn(lambda x: x.roll(1, -1) * x),
]  # fmt: skip
SEQUENCE: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(C, C), lambda: nn.LayerNorm(C), nn.GELU, Attend, lambda: Attend(is_causal=True), MHA,
    lambda: Residual(nn.TransformerEncoderLayer(C, 2, C, batch_first=True)),
    lambda: nn.Sequential(Fn(lambda x: x.flatten(0, 1)), nn.Linear(C, C), nn.LayerNorm(C), Fn(lambda x: x.view(-1, 5, C))),
    lambda: nn.Sequential(Fn(lambda x: x.transpose(0, 1).contiguous()), nn.Linear(C, C), Fn(lambda x: x.transpose(0, 1))),
    lambda: Fn(lambda x: torch.cat([x[:, -1:], x[:, :-1]], 1)), lambda: Fn(lambda x: x - x.mean(1, keepdim=True)),
]  # fmt: skip
IMAGE: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv2d(C, C, 3, padding=1), lambda: nn.Conv2d(C, C, 3, padding=1, groups=2),
    lambda: nn.Conv2d(C, C, 1, bias=False), lambda: nn.GroupNorm(4, C), lambda: nn.InstanceNorm2d(C, affine=True),
    lambda: nn.BatchNorm2d(C).eval(), nn.ReLU, nn.Hardswish, lambda: nn.PReLU(C), lambda: nn.Dropout2d(0.2),
    lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.AvgPool2d(3, 1, 1), lambda: nn.Upsample(size=4, mode="bilinear"),
    lambda: Residual(nn.Sequential(nn.ConvTranspose2d(C, C, 2, 2), nn.AvgPool2d(2))),
    lambda: nn.Sequential(nn.Conv2d(C, 4, 1), SqueezeExcite(), nn.Conv2d(4, C, 1)),
    lambda: Fn(lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1)),
]  # fmt: skip
FAMILIES = {
    "vector": (VECTOR, (6,), lambda: nn.Linear(6, C)),
    "sequence": (SEQUENCE, (5, 6), lambda: nn.Linear(6, C)),
    "image": (IMAGE, (2, 4, 4), lambda: nn.Conv2d(2, C, 1)),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**16))
def test_random_networks(data: st.DataObject, family: str, seed: int) -> None:
    layers, shape, stem = FAMILIES[family]
    picks = data.draw(st.lists(st.integers(0, len(layers) - 1), min_size=1, max_size=5), label="layers")
    batch = data.draw(st.integers(2, 9), label="batch")
    indices = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch), label="selection")
    torch.manual_seed(seed)
    net = nn.Sequential(stem(), *(layers[i]() for i in picks))
    x = torch.randn(batch, *shape)
    if family == "image" and data.draw(st.booleans(), label="channels_last"):
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    weights = torch.rand(len(indices)) + 0.5
    error, dense = compare(net.double(), x.double(), torch.tensor(indices), weights=weights)
    assert error < 1e-9
    assert not dense, dict(dense)
