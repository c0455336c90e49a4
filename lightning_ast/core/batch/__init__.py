"""The samples of a batch: found, counted, taken, looked at for NaN and replaced."""

__all__: list[str] = []
