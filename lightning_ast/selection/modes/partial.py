"""Mode ``partial``: one forward on all samples, and a backward that computes over the selected rows alone.

The gate hands on a :class:`~lightning_ast.core.RowGradient` in place of the gradient; :mod:`lightning_ast.core.partial`
computes the backward of every layer over its rows.
"""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from lightning_ast.core.partial.flops import compiled_parts
from lightning_ast.selection.modes.base import SelectionMode

__all__ = ["PartialMode"]


class PartialMode(SelectionMode):
    """Trains on the selected rows by a gradient that holds no others."""

    name = "partial"
    execution = "partial"

    def start_training(self) -> list[str]:
        """Warn where a compiled region takes the savings away."""
        if compiled_parts(self._parts.module):
            rank_zero_warn(
                "lightning-ast: a part of the module is compiled with torch.compile. mode='partial' is exact there, "
                "but runs the compiled region's whole backward: use mode='subset', or leave the network uncompiled."
            )
        return super().start_training()
