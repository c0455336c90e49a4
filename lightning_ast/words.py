"""Texts that many messages need: counts, times and sizes in words, names of any bytes, changed settings."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["aligned", "changes", "counted", "readable", "size_words", "time_words"]


def counted(number: float, noun: str) -> str:
    """Put a number and its noun together.

    Example:
        >>> counted(1, "epoch"), counted(2.5, "epoch"), counted(0, "batch"), counted(1200, "process")
        ('1 epoch', '2.5 epochs', '0 batches', '1,200 processes')
    """
    shown = f"{number:g}" if isinstance(number, float) else f"{number:,}"
    ending = "" if number == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{shown} {noun}{ending}"


def changes(saved: dict[str, Any], now: dict[str, Any], say: Callable[[Any], str] = str) -> list[str]:
    """List what differs between the settings of a checkpoint and those of this run, as ``name was x and is y``."""
    return [f"{name} was {say(saved[name])} and is {say(value)}" for name, value in now.items() if saved[name] != value]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Write a table, with each cell at the right of its column.

    Example:
        >>> print(aligned([("mode", "rate"), ("prune", "0.4")]))
         mode  rate
        prune   0.4
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


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
