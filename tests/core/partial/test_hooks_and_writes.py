"""Hooks, custom functions and writes in place on the way of a row gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core import BackwardFlops, densify, select_rows
from tests.core.partial.oracle import compare, gradients, squares
from tests.core.partial.pairs import KEPT, B, assert_close, exact_and_partial, mlp


def test_forward_hooks() -> None:
    """They run once, and may change what passes."""
    calls: list[int] = []

    def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(len(output))
        return 2 * output

    def run(keep: Any) -> dict[str, Tensor]:
        net, x = mlp(), torch.ones(B, 6).cumsum(0) / 7
        net[2].register_forward_hook(double)
        net[3].register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
        return gradients(net, keep(squares(net, x), KEPT).sum())

    assert_close(exact_and_partial(run))
    assert calls == [B, B]


def test_hooks_see_the_full_gradient() -> None:
    seen: dict[str, Any] = {}

    def triple(p: Tensor) -> None:
        p.grad.mul_(3)

    def run(keep: Any) -> dict[str, Tensor]:
        net, x = mlp(), torch.ones(B, 6).cumsum(0) / 7
        handles = [
            net[1].register_full_backward_hook(lambda m, gin, gout: seen.update({f"module-{keep.__name__}": gout[0]})),
            net[3].weight.register_hook(lambda g: 2 * g),
            net[5].bias.register_post_accumulate_grad_hook(triple),
        ]
        hidden = net[:3](x)
        hidden.register_hook(lambda g: g * 0.5)
        hidden.retain_grad()
        losses = net[3:](hidden).square().mean(1)
        found = gradients(net, keep(losses, KEPT).sum())
        for handle in handles:
            handle.remove()
        seen[f"hidden-{keep.__name__}"] = hidden.grad
        return found

    assert_close(exact_and_partial(run))
    for kind in ("module", "hidden"):
        gradient = seen[f"{kind}-keep_rows"]
        assert gradient.shape == (B, 16)
        torch.testing.assert_close(densify(gradient), densify(seen[f"{kind}-mask_rows"]))
    assert "4 of 12 samples" in repr(seen["module-keep_rows"])


def test_densify_as_a_hook_makes_the_rest_ordinary() -> None:
    net, x = mlp(), torch.randn(B, 6)
    hidden = net[:3](x)
    hidden.register_hook(densify)
    loss = select_rows(net[3:](hidden).square().mean(1), KEPT)
    with BackwardFlops() as flops:
        loss.backward()
    first = 2 * B * 6 * 16
    rest = flops.full - first
    assert flops.executed == first + rest * len(KEPT) // B


def test_in_place_layers_and_writes() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            h = F.relu_(h + 0) + 0
            h[:, 2] = 0.5
            h[:, 4:6] *= 2
            h[::2] += 1
            h.clamp_(max=1.5)
            return self.head(h)

    torch.manual_seed(0)
    assert compare(Writes(), torch.randn(B, 6), KEPT)[0] < 1e-5


WRITES: dict[str, Any] = {
    "scaled-part": lambda h: h[:, 4:6].mul_(2),
    "set-column": lambda h: h[:, 1].fill_(0.5),
    "tanh-part": lambda h: h[:, 1:].tanh_(),
    "every-other": lambda h: h[..., 1::2].mul_(-1),
    "first-part": lambda h: h[:, :4].mul_(2),
    "samples": lambda h: h[1:3].mul_(2),
    "last-sample": lambda h: h[-1].zero_(),
    "viewed": lambda h: h.view(-1, 2, 4)[:, 1].clamp_(min=0),
    "shifted": lambda h: h[:, 1:].copy_(h[:, :-1].clone()),
    "whole": lambda h: h.view(-1, 2, 4).mul_(3),
    "transposed": lambda h: h.t().add_(1),
    "masked": lambda h: h.masked_fill_(h > 0.2, 0.0),
    "indexed": lambda h: h.index_fill_(1, torch.tensor([2, 5]), 0.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_as_the_last_thing_a_layer_does(name: str) -> None:
    class Writes(nn.Module):
        def __init__(self, *, head: bool) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 3) if head else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x) * 1
            WRITES[name](h)
            return self.head(h)

    torch.manual_seed(0)
    for head in (False, True):
        for indices in (KEPT, torch.tensor([2])):
            assert compare(Writes(head=head), torch.randn(B, 6), indices)[0] < 1e-5


def write_column(g: Tensor) -> Tensor:
    g = g.clone()
    g[:, 2] = 0
    return g


def write_sample(g: Tensor) -> Tensor:
    g = g.clone()
    g[4] = 0
    return g


def add_to_part(g: Tensor) -> Tensor:
    g = g.clone()
    g[:, :2] += 1
    return g


def into_zeros(g: Tensor) -> Tensor:
    out = torch.zeros_like(g)
    out[:, 4:] = g[:, :-4]
    return out


def into_new(g: Tensor) -> Tensor:
    out = g.new_zeros(g.shape)
    out.copy_(g)
    out[:, :4].mul_(3)
    return out + g


def joined(g: Tensor) -> Tensor:
    return torch.cat([g.new_zeros(len(g), 2), g[:, 2:]], 1)


def clipped(g: Tensor) -> Tensor:
    return g / (g.norm() + 1e-3) + g.clamp(-0.01, 0.01) * g.sign().abs()


@pytest.mark.parametrize("change", [write_column, write_sample, add_to_part, into_zeros, into_new, joined, clipped])
def test_hooks_and_custom_backwards_that_write(change: Any) -> None:
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor, change: Any = change) -> Tensor:
            return change(g)

    def hooked(module: nn.Module, x: Tensor, change: Any = change) -> Tensor:
        hidden = module[:3](x)
        hidden.register_hook(change)
        return module[3:](hidden).square().mean(1)

    def custom(module: nn.Module, x: Tensor, changed: Any = Changed) -> Tensor:
        return module[3:](changed.apply(module[:3](x))).square().mean(1)

    for losses in (hooked, custom):
        assert compare(mlp(), torch.randn(B, 6), KEPT, losses)[0] < 1e-5, change.__name__


def test_custom_functions_get_rows_they_can_work_with() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * g

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(self.layer(x))

    torch.manual_seed(0)
    error, dense = compare(Net(), torch.randn(B, 6), KEPT)
    assert error < 1e-5
    assert not dense
