"""The modes: how a selection is executed, one file each."""

__all__: list[str] = []
