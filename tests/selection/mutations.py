"""Every way of changing one field of a saved state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["MISSING", "changed", "paths", "values"]

MISSING = object()
Path = tuple[Any, ...]


def paths(state: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every field of a state, those that hold others included."""
    if path:
        yield path, state
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for name, part in parts:
        yield from paths(part, (*path, name))


def values(value: Any) -> Iterator[tuple[str, Any]]:
    """What a field is changed to, by name."""
    yield from [
        ("missing", MISSING),
        ("none", None),
        ("text", "x"),
        ("list", []),
        ("dict", {}),
        ("true", True),
        ("nan", float("nan")),
        ("infinity", float("inf")),
        ("-1", -1),
        ("1.5", 1.5),
        ("huge", 10**30),
        ("huge float", 1e300),
        ("enormous", 10**5000),
        ("tensor", torch.ones(3)),
        ("sparse tensor", torch.ones(3).to_sparse()),
        ("bytes", torch.zeros(5, dtype=torch.uint8)),
    ]
    if isinstance(value, Tensor):
        yield from _tensors(value)


def _tensors(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "one more", torch.cat([value.reshape(-1), value.reshape(-1)[:1]])
    yield "shape", value.unsqueeze(0)
    yield (
        "integers" if value.is_floating_point() else "floats",
        value.int() if value.is_floating_point() else value.double(),
    )
    yield "meta", value.to("meta")
    yield "values -2", torch.full_like(value, 254 if value.dtype == torch.uint8 else -2)
    yield "values large", torch.full_like(value, 255 if value.dtype == torch.uint8 else 2**31 - 1)
    if value.is_floating_point():
        yield "values nan", torch.full_like(value, torch.nan)
        yield "values -inf", torch.full_like(value, -torch.inf)


def changed(state: Any, path: Path, value: Any) -> Any:
    """A state with one field changed; the given one is left alone."""
    name, *rest = path
    state = copy.copy(state)
    if rest:
        state[name] = changed(state[name], tuple(rest), value)
    elif value is MISSING:
        del state[name]
    else:
        state[name] = value
    return state
