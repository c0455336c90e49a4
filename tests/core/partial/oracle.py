"""The slow, obviously correct answer: ordinary autograd on the sum of the selected losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_ast.core.partial.gradient import RowGradient, wrap
from lightning_ast.core.partial.rows import Rows, place_of
from lightning_ast.core.partial.selection import select_rows

Losses = Callable[[nn.Module, Tensor], Tensor]


def mask_rows(losses: Tensor, indices: Tensor, factors: Tensor | None = None) -> Tensor:
    """Per-sample losses, zero but for the selected ones, with an ordinary backward over the whole batch."""
    picked = losses[indices] if factors is None else losses[indices] * factors.to(losses.dtype)
    return torch.zeros_like(losses).index_add(0, indices, picked)


def squares(module: nn.Module, x: Tensor) -> Tensor:
    """A loss for any output: the mean square of what belongs to a sample, each element weighted differently."""
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out
    scale = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view(out.shape[1:])
    out = out if out.dtype == torch.float64 else out.float()
    return (out * scale - 0.3).square().flatten(1).mean(1)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert all(type(g) is Tensor for g in found.values()), "gradients are ordinary tensors"
    return found


def relative(want: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """Relative L2 over all parameters; both must have a gradient for the same ones."""
    assert want.keys() == got.keys()
    a, b = (torch.cat([g.double().flatten() for g in each.values()]) for each in (want, got))
    assert a.norm() > 0, "a comparison with zero says nothing"
    # Where everything cancels out, the gradient is itself of the size of rounding: a layer that takes the mean away again.
    return float((a - b).norm() / a.norm().clamp(min=1e-6))


def compare(
    module: nn.Module,
    x: Tensor,
    indices: Tensor,
    losses: Losses = squares,
    *,
    weights: Tensor | None = None,
    batchnorm: str = "exact",
) -> tuple[float, Counter[str]]:
    """Relative error of the partial backward, and what went dense."""
    torch.manual_seed(7)
    exact = losses(module, x)[indices]
    want = gradients(module, (exact if weights is None else exact * weights).sum())
    dense: Counter[str] = Counter()
    torch.manual_seed(7)
    got = gradients(module, select_rows(losses(module, x), indices, weights, batchnorm=batchnorm, dense_ops=dense))
    return relative(want, got), dense


def row_gradient(shape: tuple[int, ...], dim: int = 0, pre: int = 1, post: int = 1) -> RowGradient:
    """Random rows of samples 0 and 2 of 7; the sample dimension has size pre * 7 * post."""
    rows = Rows(torch.tensor([0, 2]), 7, batchnorm="selected", dense_ops=Counter())
    held = list(shape)
    held[dim] = pre * 2 * post
    return wrap(torch.randn(held), rows, place_of(shape, dim, pre, post))
