"""Matrix products: linear layers, and attention written out.

``gradient @ weight`` has rows; ``gradient.T @ input`` sums over them, so only the selected rows of the input enter.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_ast.core.partial.gradient import RowGradient
from lightning_ast.core.partial.registry import rule

__all__ = []


@rule("mm", "bmm")
def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    left, right = args
    first = type(left) is RowGradient
    gradient, other = (left, right) if first else (right, left)
    place = gradient.place
    if type(other) is RowGradient or place is None:
        return NotImplemented
    if other.is_conj():  # below the level of this dispatch nobody looks at the lazy bit
        other = torch.conj_physical(other.conj())
    kept = place.from_end == (-2 if first else -1)
    if place.from_end == -3:  # one product for each row
        other = gradient.rows_of(other, 0)
        kept = True
    elif not kept:  # summed over the rows
        other = gradient.rows_of(other, other.dim() - 2 if first else other.dim() - 1)
    product = torch.mm if left.dim() == 2 else torch.bmm
    out = product(gradient.data_rows, other) if first else product(other, gradient.data_rows)
    return gradient.like(out) if kept else out


@rule("mv", "dot")
def _matvec(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply a matrix by a vector of rows: the product is summed over them."""
    other, gradient = args
    if type(other) is RowGradient or gradient.place is None:
        return NotImplemented
    return func(gradient.rows_of(other, other.dim() - 1), gradient.data_rows)
