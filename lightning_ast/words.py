"""Numbers with their nouns, as a person writes them."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: float, noun: str) -> str:
    """Put a number and its noun together.

    Args:
        number: A count, shown with commas between thousands; a float is shown with up to six digits.
        noun: The noun in the singular.

    Example:
        >>> counted(1, "epoch"), counted(2.5, "epoch"), counted(0, "batch"), counted(1200, "process")
        ('1 epoch', '2.5 epochs', '0 batches', '1,200 processes')
    """
    shown = f"{number:g}" if isinstance(number, float) else f"{number:,}"
    ending = "" if number == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{shown} {noun}{ending}"
