"""Row rules by family. Importing this package fills :data:`lightning_ast.core.partial.registry.RULES`."""

from lightning_ast.core.partial.rules import (
    attention,
    indexing,
    losses,
    matmul,
    normalization,
    pointwise,
    reductions,
    spatial,
    views,
)

__all__ = [
    "attention",
    "indexing",
    "losses",
    "matmul",
    "normalization",
    "pointwise",
    "reductions",
    "spatial",
    "views",
]
