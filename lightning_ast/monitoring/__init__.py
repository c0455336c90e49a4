"""The things that the monitors show and remember of a run."""

__all__: list[str] = []
