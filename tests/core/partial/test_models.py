"""Whole architectures against exact masking, what goes dense in them, and the FLOPs that are really run."""

from __future__ import annotations

import pytest
import torch

from lightning_ast.testing import check_partial_backward
from tests.core.partial.models import MODELS, B, build, class_losses

LARGE = ("resnet50", "convnext_tiny", "densenet121", "swin_t", "vit_b_16")
"""Models of which the fast tests check one number of rows: all four take half a minute."""


def rows_of(name: str) -> list[object]:
    """Numbers of rows out of ``B`` to select, the slow ones marked."""
    slow = [pytest.mark.slow] if name in LARGE else []
    return [pytest.param(name, k, marks=slow if k != 4 else []) for k in (1, 2, 4, B)]


@pytest.mark.parametrize(("name", "selected"), [case for name in MODELS for case in rows_of(name)])
def test_gradients_equal_exact_masking(name: str, selected: int) -> None:
    make, data, dense = MODELS[name]
    indices = torch.randperm(B)[:selected].sort().values
    check = check_partial_backward(build(make), data(), indices=indices, losses=class_losses)
    assert check.relative_error < 1e-5, check
    assert set(check.dense_ops) == (dense if selected < B else set()), check
    if not dense:
        assert check.flops_share == pytest.approx(selected / B, rel=0.02), check


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "unet"])
def test_channels_last(name: str) -> None:
    make, data, dense = MODELS[name]
    x, *rest = data()
    module = build(make).to(memory_format=torch.channels_last)
    batch = x.contiguous(memory_format=torch.channels_last), *rest
    check = check_partial_backward(module, batch, losses=class_losses)
    assert check.relative_error < 1e-5
    assert set(check.dense_ops) == dense


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "efficientnet_b0", "mobilenet_v3_small", "densenet121", "regnet_y_400mf"]
)
def test_the_backward_costs_what_was_selected(name: str) -> None:
    """With BatchNorm over the selected rows, nothing is left that is dense."""
    make, data, _ = MODELS[name]
    for selected in (4, 7):
        check = check_partial_backward(
            build(make), data(), indices=torch.arange(selected), losses=class_losses, batchnorm="selected"
        )
        assert not check.dense_ops
        assert check.flops_share == pytest.approx(selected / B, rel=0.02)


def test_selected_batchnorm_is_an_approximation_and_exact_is_not() -> None:
    make, data, _ = MODELS["resnet18"]
    torch.manual_seed(1)
    module, batch, indices = build(make), data(), torch.arange(4)
    off = check_partial_backward(module, batch, indices=indices, losses=class_losses, batchnorm="selected")
    exact = check_partial_backward(module, batch, indices=indices, losses=class_losses, batchnorm="exact")
    assert 0.5 < off.cosine < 0.999
    assert exact.relative_error < 1e-5
    assert exact.flops_share > 0.9
    assert off.flops_share == pytest.approx(0.4, rel=0.02)
