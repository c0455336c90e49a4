"""Beside the steps of a batch: checks of the single values of a saved state, and of dicts and lists of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.state import Check, Faults, described, dtype_name, fault_at, field_path, is_whole

__all__ = [
    "JOULES",
    "LONGEST_SECONDS",
    "SECONDS",
    "SHARE",
    "Rule",
    "choice",
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

_LARGEST = 2**62

Rule = Callable[[Any], Faults]
"""Asked of a value whose fields are all right by themselves."""


# ---------------------------------------------------------------------- single values


def whole(low: int = 0, high: int = _LARGEST) -> Check:
    """Allow an int within bounds."""
    bounds = f">= {low}" if high == _LARGEST else f"in [{low}, {high}]"
    return Check(f"an int {bounds}", lambda value: is_whole(value) and low <= value <= high)


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
        lambda value: any(type(value) is type(each) and value == each for each in values),
    )


def tensor(
    *dtypes: torch.dtype,
    shape: tuple[int | None, ...],
    values: str = "any values",
    allowed: Callable[[Tensor], Tensor] | None = None,
) -> Check:
    """Allow a dense tensor.

    Args:
        dtypes: The types that are right; without any, every floating-point type is.
        shape: The sizes; None for any size.
        values: The right values, in words.
        allowed: A function that tells of each value whether it is right.
    """
    kind = " or ".join(dtype_name(dtype) for dtype in dtypes) or "floating-point"
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
        return [fault_at(path, values, each) for each in wrong]

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


# ---------------------------------------------------------------------- values that hold others


def record(required: Mapping[str, Check], later: Mapping[str, Check] | None = None, *rules: Rule) -> Check:
    """Allow a dict of named fields.

    Args:
        required: The fields that every release has written.
        later: The fields that were added since: a state may lack them.
        rules: The rules of what must fit together; asked where each field is right by itself.
    """
    added = {} if later is None else later

    def inner(value: dict[Any, Any], path: str) -> list[str]:
        found = [
            f"{field_path(path, name)}: expected {check.expected}, but the key is missing."
            for name, check in required.items()
            if name not in value
        ]
        for name, check in {**required, **added}.items():
            if name in value:
                found += check.faults(value[name], field_path(path, name))
        if not found:  # a rule may read any of the fields
            found += [
                fault_at(field_path(path, name), expected, got) for rule in rules for name, expected, got in rule(value)
            ]
        return found

    return Check("a dict", lambda value: isinstance(value, dict), inner)


def mapping(key: Check, check: Check) -> Check:
    """Allow a dict of any length; one check is for all its keys, another for all its values."""

    def inner(value: dict[Any, Any], path: str) -> list[str]:
        keys = [f"{path}: expected keys that are {key.expected}, got {described(k)}." for k in value if not key.test(k)]
        return keys + [fault for k, each in value.items() for fault in check.faults(each, field_path(path, k))]

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

    return Check(expected, lambda value: isinstance(value, (list, tuple)) and fits(len(value)), inner)
