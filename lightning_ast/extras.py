"""Optional packages: the error for one that is not installed names the extra to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_ast.errors import MissingPackageError

__all__ = ["needs"]


@contextmanager
def needs(extra: str, *packages: str) -> Iterator[None]:
    """Import optional packages inside this; where one of them is not installed, the error names the extra.

    Example:
        >>> with needs("vision", "no_such_package"):
        ...     import no_such_package
        Traceback (most recent call last):
        ...
        lightning_ast.errors.MissingPackageError: no_such_package is missing: pip install 'lightning-ast[vision]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        named = (error.name or "").partition(".")[0]
        # Lightning's own error about jsonargparse has a message, but no name
        missing = named if error.name else next((name for name in packages if name in str(error)), "")
        if missing not in packages:
            raise
        message = f"{missing} is missing: pip install 'lightning-ast[{extra}]'"
        raise MissingPackageError(message, name=error.name) from error
