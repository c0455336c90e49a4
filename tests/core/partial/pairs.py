"""The same backward, exact and over the selected rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_ast.core import keep_rows
from tests.core.partial.oracle import mask_rows, relative

__all__ = ["KEPT", "B", "assert_close", "exact_and_partial", "mlp"]

B = 12
KEPT = torch.tensor([0, 3, 4, 9])


def mlp(*, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5)
    )


def exact_and_partial(run: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``run(keep)`` does a whole step with one of the two and returns gradients."""
    return run(mask_rows), run(keep_rows)


def assert_close(pair: tuple[dict[str, Tensor], dict[str, Tensor]], tolerance: float = 1e-5) -> None:
    assert relative(*pair) < tolerance
