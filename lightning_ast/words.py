"""Texts that many messages need: numbers with their nouns, and what differs between two settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["changes", "counted"]


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


def changes(saved: dict[str, Any], now: dict[str, Any], say: Callable[[Any], str] = str) -> list[str]:
    """List what differs between the settings of a checkpoint and those of this run, as ``name was x and is y``.

    Args:
        saved: The settings of the checkpoint, by name.
        now: The settings of this run, by name.
        say: Writes a setting as text.
    """
    return [f"{name} was {say(saved[name])} and is {say(value)}" for name, value in now.items() if saved[name] != value]
