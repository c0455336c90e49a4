"""The row rules, a file for each family of ops. Importing this package fills the table of the ``registry``."""

# ruff: noqa: F401
from lightning_ast.core.partial.rules import attention, indexing, losses, normalization, pointwise, reductions

from lightning_ast.core.partial.rules import spatial, views  # isort: skip

__all__: list[str] = []
