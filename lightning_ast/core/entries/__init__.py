"""Where the gradient of a loss enters the network, and which of its rows belong to which sample."""

__all__: list[str] = []
