"""Parameters that begin at zero hide what the output depends on: heads, adapters, residual branches."""

from __future__ import annotations

import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn

from lightning_ast.core.dependence.trace import SampleTrace

B = 6


class Adapter(nn.Module):
    """A low-rank adapter whose second matrix begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 2, bias=False)
        self.second = nn.Linear(2, 5, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both matrices."""
        out: Tensor = self.second(self.first(x.flatten(1)))
        return out


class Residual(nn.Module):
    """A branch behind a BatchNorm with a scale of zero, and one behind a learned factor of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 6)
        self.factor = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm1d(6)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branches."""
        hidden = self.layer(x.flatten(1))
        out: Tensor = self.norm(hidden) + self.factor * hidden
        return out


@pytest.mark.parametrize(
    "make",
    [lambda: zoo.VisionTransformer(4, 2, 1, 2, 16, 32, num_classes=5), Adapter, Residual],
    ids=["vit", "adapter", "residual"],
)
def test_zeros_hide_nothing_and_change_nothing(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = make()
    x = torch.randn(B, 3, 4, 4)
    trace = SampleTrace((x,), B)
    with trace:
        out = network(x)
    assert out.grad_fn is not None
    found = trace.dependence(out.grad_fn, out.output_nr)
    assert found is not None
    assert found.profiles[0].nonzero().flatten().tolist() == [trace.sample]
    assert torch.equal(out.detach(), network(x).detach())
