"""What the selection callback does in one fit."""

__all__: list[str] = []
