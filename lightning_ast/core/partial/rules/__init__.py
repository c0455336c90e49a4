"""The row rules, a file for each family of ops. Importing this package fills the table of the ``registry``."""

# ruff: noqa: F401
from lightning_ast.core.partial.rules import indexing, normalization, pointwise, reductions, spatial, views

__all__: list[str] = []
