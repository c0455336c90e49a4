"""What is wrong with single numbers of a configuration."""

from __future__ import annotations

from typing import TypeGuard

__all__ = ["is_number", "percent_hint", "rate_faults"]


def rate_faults(name: str, value: object, *, kind: str = "rate") -> list[str]:
    """Find what is wrong with an activation rate, or with another share of that range that is called by its kind."""
    good = is_number(value) and 0 < value <= 1
    return [] if good else [f"{name}: expected a {kind} in (0, 1], got {value!r}.{percent_hint(value)}"]


def percent_hint(value: object) -> str:
    """Return the share that was meant where a percentage was given, as the end of a message; else nothing."""
    return f" Did you mean {value / 100:g}?" if is_number(value) and 1 < value <= 100 else ""


def is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
