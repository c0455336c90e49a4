"""Epochs that load a part of the data set alone, for mode ``prune``."""

__all__: list[str] = []
