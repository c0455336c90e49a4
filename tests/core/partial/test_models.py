"""Whole architectures against exact masking, what goes dense in them, and the FLOPs that are really run."""

from __future__ import annotations

import pytest
import torch

from lightning_ast.testing import check_partial_backward
from tests.core.partial.models import MODELS, PUBLISHED, B, build, class_losses

EVERY = MODELS | PUBLISHED
BATCHNORMS = ("resnet", "bottlenecks", "efficientnet", "mobilenet", "densenet", "regnet")


def both(small: tuple[str, ...], large: tuple[str, ...]) -> list[object]:
    """Names of networks of few layers, and of published ones, which are slow."""
    return [*small, *(pytest.param(name, marks=pytest.mark.slow) for name in large)]


@pytest.mark.parametrize(
    ("name", "selected"),
    [
        *((name, selected) for name in MODELS for selected in (1, 2, 4, B)),
        *(pytest.param(name, selected, marks=pytest.mark.slow) for name in PUBLISHED for selected in (1, 4)),
    ],
)
def test_gradients_equal_exact_masking(name: str, selected: int) -> None:
    make, data, dense = EVERY[name]
    indices = torch.randperm(B)[:selected].sort().values
    check = check_partial_backward(build(make), data(), indices=indices, losses=class_losses)
    assert check.relative_error < 1e-5, check
    assert set(check.dense_ops) == (dense if selected < B else set()), check
    if not dense:
        assert check.flops_share == pytest.approx(selected / B, rel=0.02), check


@pytest.mark.parametrize("name", both(("resnet", "convnext", "unet"), ("resnet18", "convnext_tiny")))
def test_channels_last(name: str) -> None:
    make, data, dense = EVERY[name]
    x, *rest = data()
    module = build(make).to(memory_format=torch.channels_last)
    batch = x.contiguous(memory_format=torch.channels_last), *rest
    check = check_partial_backward(module, batch, losses=class_losses)
    assert check.relative_error < 1e-5
    assert set(check.dense_ops) == dense


@pytest.mark.parametrize(
    "name",
    both(
        BATCHNORMS,
        ("resnet18", "resnet50", "efficientnet_b0", "mobilenet_v3_small", "densenet121", "regnet_y_400mf"),
    ),
)
def test_the_backward_costs_what_was_selected(name: str) -> None:
    """With BatchNorm over the selected rows, nothing is left that is dense."""
    make, data, _ = EVERY[name]
    for selected in (4, 7):
        check = check_partial_backward(
            build(make), data(), indices=torch.arange(selected), losses=class_losses, batchnorm="selected"
        )
        assert not check.dense_ops
        assert check.flops_share == pytest.approx(selected / B, rel=0.02)


def test_selected_batchnorm_is_an_approximation_and_exact_is_not() -> None:
    make, data, _ = MODELS["resnet"]
    torch.manual_seed(1)
    module, batch, indices = build(make), data(), torch.arange(4)
    off = check_partial_backward(module, batch, indices=indices, losses=class_losses, batchnorm="selected")
    exact = check_partial_backward(module, batch, indices=indices, losses=class_losses, batchnorm="exact")
    assert 0.5 < off.cosine < 0.999
    assert exact.relative_error < 1e-5
    assert exact.flops_share > 0.9
    assert off.flops_share == pytest.approx(0.4, rel=0.02)
