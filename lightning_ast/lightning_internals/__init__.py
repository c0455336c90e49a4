"""Everything private of Lightning and of torchmetrics that this package reads or changes.

``tests/lightning_internals/table.py`` lists it.
"""

__all__: list[str] = []
