"""Texts that can be shown anywhere: names that a file system gave, numbers of any size."""

from __future__ import annotations

import unicodedata

__all__ = ["percent", "readable"]


def readable(text: str) -> str:
    r"""Replace what cannot be encoded or drawn: bytes of a name that are not UTF-8, and control characters.

    Example:
        >>> print(readable("run-\udcff"), readable("a\nb"), readable("\udcc3\udca9"))
        run-\xff a\x0ab é
    """
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair, as names on Windows may hold
        text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" else c for c in text)


def percent(share: float, digits: int = 1) -> str:
    """Format a share as a percentage, one of absurd size with few characters.

    Example:
        >>> percent(0.196), percent(-5e26)
        ('19.6%', '-5e+28%')
    """
    return f"{share:.{digits}%}" if abs(share) < 100 else f"{100 * share:.3g}%"
