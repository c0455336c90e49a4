"""The modes: how a selection is executed, one file each.

A further mode needs its name and facts in :mod:`lightning_ast.mode_facts`, a file here with a subclass of
``SelectionMode``, and a line in ``registry``.
"""

__all__: list[str] = []
