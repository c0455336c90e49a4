"""Seconds and bytes in words."""

from __future__ import annotations

__all__ = ["size_words", "time_words"]


def time_words(seconds: float) -> str:
    """Write a time in a unit that suits.

    Example:
        >>> time_words(0.0123), time_words(0.9997), time_words(2.5), time_words(90_000)
        ('12.3 ms', '1 s', '2.5 s', '25.0 h')
    """
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"


def size_words(size: int) -> str:
    """Write bytes in a unit that suits.

    Example:
        >>> size_words(3 << 20)
        '3 MiB'
    """
    for unit, power in (("KiB", 10), ("MiB", 20)):
        if size < 1000 << power:
            return f"{size / (1 << power):.3g} {unit}"
    return f"{size / (1 << 30):.3g} GiB"
