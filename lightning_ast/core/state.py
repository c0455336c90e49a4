"""Beside the steps of a batch: what a saved state must look like, as checks of values that make up a whole state.

A state comes from a file: it may be damaged, or another release's. It is checked as a whole before any of it is used,
so that nothing is half-applied, and each fault names the field, what was expected and what was found.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_ast.errors import CheckpointError

__all__ = [
    "JOULES",
    "LONGEST_SECONDS",
    "SECONDS",
    "SHARE",
    "Check",
    "Faults",
    "StateFormat",
    "choice",
    "known_fields",
    "listing",
    "mapping",
    "maybe",
    "number",
    "positional",
    "record",
    "tensor",
    "text",
    "whole",
]

T = TypeVar("T")

_CHARACTERS = 60
_LARGEST = 2**62

Faults = Iterator[tuple[str, str, Any]]
"""What does not fit together: field, what was expected, what was found."""

_Rule = Callable[[Any], Faults]
"""Asked of a value whose fields are all right by themselves."""


@dataclass(frozen=True)
class Check:
    """What a value must be: in words, as a test of its kind, and what finds the faults within a value of that kind."""

    expected: str
    test: Callable[[Any], bool]
    inner: Callable[[Any, str], list[str]] = lambda value, path: []

    def faults(self, value: Any, path: str) -> list[str]:
        """Find what is wrong with a value and name it by its path."""
        return self.inner(value, path) if self.test(value) else [_fault(path, self.expected, value)]


@dataclass(frozen=True)
class StateFormat:
    """What an object writes into a checkpoint, and the newest version of it that this release understands."""

    # The version counts changes of meaning alone. Keys that are not specified are ignored, for a later release may have
    # added them; such a release specifies them as `later`, with a default where they are read.
    version: int
    check: Check

    def stamped(self, state: dict[str, Any]) -> dict[str, Any]:
        """Add the version to a state that is about to be saved."""
        return {"version": self.version, **state}

    def faults(self, state: Any) -> list[str]:
        """Find everything that is wrong with a saved state; without a version it is of the first."""
        found = state.get("version", 1) if isinstance(state, dict) else 1
        if not _is_whole(found) or found < 1:
            return [_fault("version", "an int >= 1", found)]
        if found > self.version:
            later = "a later release of lightning-ast wrote it: update lightning-ast"
            return [f"version: expected at most {self.version}, got {_described(found)}; {later}."]
        return self.check.faults(state, "")

    def require(self, state: Any, *, owner: str) -> None:
        """Refuse a state that cannot be used: raise CheckpointError with all its faults, and the callback's name."""
        if faults := self.faults(state):
            raise CheckpointError(owner, faults)


def known_fields(cls: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Make a dataclass of the values that it has fields for; leave out those that a later release has added."""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in values.items() if name in names})


def whole(low: int = 0, high: int = _LARGEST) -> Check:
    """Allow an int within bounds."""
    bounds = f">= {low}" if high == _LARGEST else f"in [{low}, {high}]"
    return Check(f"an int {bounds}", lambda value: _is_whole(value) and low <= value <= high)


def number(low: float = -math.inf, high: float = math.inf, *, nan: bool = False, infinite: bool = False) -> Check:
    """Allow a float or an int within bounds; NaN and infinity only where the arguments allow them."""
    expected = "a number" if infinite or nan else "a finite number"
    if low > -math.inf:
        expected += f" >= {low:g}" if high == math.inf else f" in [{low:g}, {high:g}]"
    expected += " or NaN" if nan else ""

    def test(value: Any) -> bool:
        # True is an int, and NaN is in no range: both are told apart first.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if isinstance(value, float) and math.isnan(value):
            return nan
        return low <= value <= high and (infinite or abs(value) <= sys.float_info.max)

    return Check(expected, test)


def text() -> Check:
    """Allow any text."""
    return Check("text", lambda value: isinstance(value, str))


def choice(*values: Any) -> Check:
    """Allow one of some values, of the same type."""
    return Check(
        f"one of {', '.join(map(repr, values))}",
        lambda value: any(type(value) is type(each) and value == each for each in values),  # 1 == True == 1.0
    )


def tensor(
    *dtypes: torch.dtype,
    shape: tuple[int | None, ...],
    values: str = "any values",
    allowed: Callable[[Tensor], Tensor] | None = None,
) -> Check:
    """Allow a dense tensor of these types (without any: floating-point ones) and sizes (None: any).

    ``allowed`` tells of each value whether it is right; ``values`` names those in words.
    """
    kind = " or ".join(_name(dtype) for dtype in dtypes) or "floating-point"
    sizes = f"({', '.join('n' if size is None else str(size) for size in shape)}{',' * (len(shape) == 1)})"

    def test(value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.device.type != "meta"
            and (value.dtype in dtypes if dtypes else value.is_floating_point())
            and value.ndim == len(shape)
            and all(size is None or size == own for size, own in zip(shape, value.shape, strict=True))
        )

    def inner(value: Tensor, path: str) -> list[str]:
        wrong = [] if allowed is None else value[~allowed(value)].flatten()[:1].tolist()
        return [_fault(path, values, each) for each in wrong]

    return Check(f"a {kind} tensor of shape {sizes}", test, inner)


def maybe(check: Check) -> Check:
    """Allow None, and what a check allows."""
    return Check(
        f"{check.expected} or None",
        lambda value: value is None or check.test(value),
        lambda value, path: [] if value is None else check.inner(value, path),
    )


LONGEST_SECONDS = 2.0**32
SHARE = number(0, 1)
SECONDS = number(0, LONGEST_SECONDS)
JOULES = number(0, 1e15)


def record(required: Mapping[str, Check], later: Mapping[str, Check] | None = None, *rules: _Rule) -> Check:
    """Allow a dict of named fields; a state may lack those that were added ``later``, after the first release."""
    known = {**required, **(later or {})}

    def inner(value: dict[Any, Any], path: str) -> list[str]:
        found = [
            f"{_field(path, name)}: expected {check.expected}, but the key is missing."
            for name, check in required.items()
            if name not in value
        ]
        for name, check in known.items():
            if name in value:
                found += check.faults(value[name], _field(path, name))
        if not found:  # a rule may read any of the fields
            faults = [fault for rule in rules for fault in rule(value)]
            found += [_fault(_field(path, name), expected, got) for name, expected, got in faults]
        return found

    return Check("a dict", lambda value: isinstance(value, dict), inner)


def mapping(key: Check, check: Check) -> Check:
    """Allow a dict of any length; one check is for all its keys, another for all its values."""

    def inner(value: dict[Any, Any], path: str) -> list[str]:
        wrong = [k for k in value if not key.test(k)]
        keys = [f"{path}: expected keys that are {key.expected}, got {_described(k)}." for k in wrong]
        return keys + [fault for k, each in value.items() for fault in check.faults(each, _field(path, k))]

    return Check("a dict", lambda value: isinstance(value, dict), inner)


def listing(check: Check, *, least: int = 0) -> Check:
    """Allow a list with at least so many entries; one check is for all of them."""
    expected = f"a list of at least {least}" if least else "a list"
    return _list(expected, lambda length: length >= least, repeat(check))


def positional(*checks: Check) -> Check:
    """Allow a list of fixed length, with a check for each entry."""
    return _list(f"a list of {len(checks)}", lambda length: length == len(checks), checks)


def _list(expected: str, fits: Callable[[int], bool], checks: Iterable[Check]) -> Check:
    def inner(value: list[Any], path: str) -> list[str]:
        parts = enumerate(zip(value, checks, strict=False))
        return [fault for i, (each, check) in parts for fault in check.faults(each, f"{path}[{i}]")]

    # A tuple is a list too: some savers turn one into the other.
    return Check(expected, lambda value: isinstance(value, (list, tuple)) and fits(len(value)), inner)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _field(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _fault(path: str, expected: str, value: Any) -> str:
    return f"{path or 'the state'}: expected {expected}, got {_described(value)}."


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {_name(value.dtype)} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to write ints of thousands of digits out
        shown = "a huge int"
    shown = shown if len(shown) <= _CHARACTERS else f"{shown[:_CHARACTERS]}..."
    return shown if value is None or isinstance(value, (int, float)) else f"{shown} ({type(value).__name__})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
