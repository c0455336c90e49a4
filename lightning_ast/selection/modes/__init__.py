"""The modes: how a selection is executed, one file each.

A further mode is a file here with a subclass of :class:`~lightning_ast.selection.modes.base.SelectionMode`, a line in
``registry``, its name in :data:`lightning_ast.core.execution.Mode` and its cost in
:func:`lightning_ast.core.cost_share`.
"""

__all__: list[str] = []
