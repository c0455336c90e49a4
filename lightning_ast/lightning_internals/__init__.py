"""Everything private of Lightning and of torchmetrics that this package reads or changes; :mod:`.table` lists it."""

__all__: list[str] = []
