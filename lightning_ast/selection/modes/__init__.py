"""The modes by name: how a selection is executed, one file each.

A further mode needs its name and facts in :mod:`lightning_ast.mode_facts`, a file here with a subclass of
``SelectionMode``, and its class in the table below.
"""

from __future__ import annotations

from lightning_ast.mode_facts import Mode
from lightning_ast.selection.modes.base import SelectionMode
from lightning_ast.selection.modes.mask import MaskMode
from lightning_ast.selection.modes.partial import PartialMode
from lightning_ast.selection.modes.prune import PruneMode
from lightning_ast.selection.modes.subset import SubsetMode

__all__ = ["MODE_CLASSES"]

MODE_CLASSES: dict[Mode, type[SelectionMode]] = {
    mode.name: mode for mode in (MaskMode, SubsetMode, PartialMode, PruneMode)
}
