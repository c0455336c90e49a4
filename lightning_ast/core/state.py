"""Beside the steps of a batch: what a saved state must look like, as checks of values that make up a whole state.

A state comes from a file: it may be damaged, or another release's. It is checked as a whole before any of it is used,
so that nothing is half-applied, and each fault names the field, what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_ast.errors import CheckpointError

__all__ = [
    "Check",
    "Faults",
    "StateFormat",
    "described",
    "dtype_name",
    "fault_at",
    "field_path",
    "is_whole",
    "known_fields",
]

T = TypeVar("T")

_CHARACTERS = 60

Faults = Iterator[tuple[str, str, Any]]
"""What does not fit together: field, what was expected, what was found."""


@dataclass(frozen=True)
class Check:
    """What a value must be.

    Attributes:
        expected: The value in words.
        test: A function that tells whether a value is of the right kind.
        inner: A function that finds the faults within a value of the right kind, from the value and its path.
    """

    expected: str
    test: Callable[[Any], bool]
    inner: Callable[[Any, str], list[str]] = lambda value, path: []

    def faults(self, value: Any, path: str) -> list[str]:
        """Find what is wrong with a value and name it by its path."""
        return self.inner(value, path) if self.test(value) else [fault_at(path, self.expected, value)]


@dataclass(frozen=True)
class StateFormat:
    """What an object writes into a checkpoint.

    Keys that are not specified are ignored: a later release may have added them. So the version counts changes of
    meaning alone: a release that only adds a key specifies it as ``later``, with a default where it is read.

    Attributes:
        version: The newest version that this release understands, and the one that it writes.
        check: The check of a whole state.
    """

    version: int
    check: Check

    def stamped(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add the version to a state that is about to be saved."""
        return {"version": self.version, **state}

    def faults(self, state: Any) -> list[str]:
        """Find everything that is wrong with a saved state; without a version it is of the first."""
        found = state.get("version", 1) if isinstance(state, dict) else 1
        if not is_whole(found) or found < 1:
            return [fault_at("version", "an int >= 1", found)]
        if found > self.version:
            later = "a later release of lightning-ast wrote it: update lightning-ast"
            return [f"version: expected at most {self.version}, got {described(found)}; {later}."]
        return self.check.faults(state, "")

    def require(self, state: Any, *, owner: str) -> None:
        """Refuse a state that cannot be used.

        Args:
            state: The saved state.
            owner: The callback whose state it is, as the checkpoint names it.

        Raises:
            CheckpointError: It has faults; all of them are named.
        """
        if faults := self.faults(state):
            raise CheckpointError(owner, faults)


def known_fields(cls: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Make a dataclass of the values that it has fields for; leave out those that a later release has added."""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in values.items() if name in names})


# ---------------------------------------------------------------------- words


def is_whole(value: Any) -> bool:
    """Tell whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def field_path(path: str, name: Any) -> str:
    """Name a field of a field."""
    return f"{path}.{name}" if path else str(name)


def fault_at(path: str, expected: str, value: Any) -> str:
    """Name a field, what was expected of it, and what it holds."""
    return f"{path or 'the state'}: expected {expected}, got {described(value)}."


def described(value: Any) -> str:
    """Describe what was found, in few words."""
    if isinstance(value, Tensor):
        return f"a {dtype_name(value.dtype)} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to write ints of thousands of digits out
        shown = "a huge int"
    shown = shown if len(shown) <= _CHARACTERS else f"{shown[:_CHARACTERS]}..."
    return shown if value is None or isinstance(value, (int, float)) else f"{shown} ({type(value).__name__})"


def dtype_name(dtype: torch.dtype) -> str:
    """Name a type of tensors as torch does."""
    return str(dtype).removeprefix("torch.")
