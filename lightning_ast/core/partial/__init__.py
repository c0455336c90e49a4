"""Partial backward: one forward over the batch, a backward that computes over the selected rows only.

``rows`` says which rows and gathers them, ``gradient`` is the tensor that travels through the backward, ``registry``
and ``rules`` say how each op treats it, ``memory`` is what formulas write into, ``selection`` is the entry, ``flops``
counts.
"""

from lightning_ast.core.partial import rules
from lightning_ast.core.partial.flops import BackwardFlops, RowOps, compiled_parts, uncounted
from lightning_ast.core.partial.gradient import RowGradient
from lightning_ast.core.partial.memory import densify
from lightning_ast.core.partial.rows import BatchNormBackward
from lightning_ast.core.partial.selection import keep_rows, select_rows

__all__ = [
    "BackwardFlops",
    "BatchNormBackward",
    "RowGradient",
    "RowOps",
    "compiled_parts",
    "densify",
    "keep_rows",
    "rules",
    "select_rows",
    "uncounted",
]
