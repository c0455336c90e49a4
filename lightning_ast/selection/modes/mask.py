"""Mode ``mask``: the gradient rows of the other samples are set to zero, and the whole backward runs.

It saves nothing and is here for comparison: it is what the original does.
"""

from __future__ import annotations

from lightning_ast.selection.modes.base import SelectionMode

__all__ = ["MaskMode"]


class MaskMode(SelectionMode):
    """Trains on the selected rows by zeros in the gradient of the others."""

    name = "mask"
