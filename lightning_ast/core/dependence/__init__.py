"""Which rows of which tensors depend on which sample, found by running a forward with one sample changed."""

__all__: list[str] = []
