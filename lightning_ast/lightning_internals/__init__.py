"""Everything private that is read or changed of Lightning."""

__all__: list[str] = []
