"""The one approximation, against its definition channel by channel, and what it keeps of the exact gradient."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lightning_ast.core import densify, select_rows
from tests.core.partial.oracle import compare, squares

B = 12
KEPT = torch.tensor([1, 4, 6, 11])


def by_hand(g: Tensor, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias from the selected rows of ``g``, one channel and one value at a time."""
    out, weights, biases = torch.zeros_like(x), [], []
    for c in range(x.shape[1]):
        full = x[:, c]
        invstd = 1 / (full.var(correction=0) + norm.eps).sqrt()
        own, grad = x[KEPT, c], g[KEPT, c]
        normal = (own - own.mean()) / (own.var(correction=0) + norm.eps).sqrt()
        weight = 1.0 if norm.weight is None else norm.weight[c].detach()
        out[KEPT, c] = weight * invstd * (grad - grad.mean() - normal * (grad * normal).mean())
        weights.append((grad * (own - full.mean()) * invstd).sum())
        biases.append(grad.sum())
    return out, torch.stack(weights), torch.stack(biases)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(8,), (5,), (3, 2), (2, 2, 2)], ids=["1d", "1d-L", "2d", "3d"])
def test_selected_is_its_definition(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(shape)]
    norm = kind(3, affine=affine)
    x = torch.randn(B, 3, *shape, requires_grad=True)
    losses = (norm(x) * torch.linspace(0.1, 2, x[0].numel()).view(3, *shape)).sin().flatten(1).sum(1)
    hidden = norm(x)
    (g,) = torch.autograd.grad(
        (hidden * torch.linspace(0.1, 2, x[0].numel()).view(3, *shape)).sin().flatten(1).sum(1)[KEPT].sum(), hidden
    )
    dense: Counter[str] = Counter()
    select_rows(losses, KEPT, dense_ops=dense).backward()
    want, weight, bias = by_hand(g, x.detach(), norm)
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-5)
    assert set(dense) <= {"aten.detach.default"}  # the input's own .grad
    if affine:
        torch.testing.assert_close(norm.weight.grad, weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.bias.grad, bias, rtol=1e-4, atol=1e-5)


def test_nothing_is_left_along_a_shift_or_a_scale_of_the_input() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
    losses = norm(conv(torch.randn(B, 2, 6, 6))).sin().flatten(1).sum(1)
    select_rows(losses, KEPT).backward()
    assert conv.bias.grad.abs().max() < 1e-4, "a shift"
    along = (conv.weight.grad * conv.weight).sum((1, 2, 3)) + conv.bias.grad * conv.bias
    assert along.abs().max() < 1e-2 * conv.weight.grad.norm(), "a scale"


def test_too_few_values_go_dense_and_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    error, dense = compare(net, torch.randn(B, 6), KEPT[:3], batchnorm="selected")
    assert error < 1e-5
    assert list(dense) == ["aten.native_batch_norm_backward.default"]


def test_frames_folded_into_the_batch_and_mixed_precision() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    video = torch.randn(B, 3, 2, 6, 6)

    def frames(module: nn.Module, x: Tensor) -> Tensor:
        return module(x.flatten(0, 1)).view(B, 3, 2).square().mean((1, 2))

    def mixed(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return frames(module, x).float()

    for losses in (frames, mixed):
        error, dense = compare(net, video, KEPT, losses, batchnorm="selected")
        assert error < 0.5
        assert not dense
    assert compare(net, video, KEPT, frames, batchnorm="exact")[0] < 1e-5


def test_every_row_selected_is_the_exact_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    assert compare(net, torch.randn(B, 6), torch.arange(B), batchnorm="selected")[0] < 1e-6


def test_evaluation_mode_is_exact() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6).eval()
    norm.running_mean += 0.3
    x = torch.randn(B, 6)
    for batchnorm in ("selected", "exact"):
        error, dense = compare(nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 2)), x, KEPT, batchnorm=batchnorm)
        assert error < 1e-5
        assert not dense
    hidden = nn.Linear(6, 6)(x)
    (g,) = torch.autograd.grad(select_rows(squares(norm, hidden), KEPT), hidden)
    assert densify(g)[0].abs().sum() == 0
