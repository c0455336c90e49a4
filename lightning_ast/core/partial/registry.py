"""Step 6, the table of row rules: which function runs a backward op over the selected rows alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload

__all__ = ["RULES", "Rule", "is_view", "overload", "rule", "runs_by_parts"]

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""``(op, args, kwargs)`` as autograd called it, with a RowGradient or more among them; returns ``NotImplemented`` where
they cannot be taken row by row."""

RULES: dict[OpOverload, Rule] = {}
"""Filled by the modules of :mod:`lightning_ast.core.partial.rules`."""


def overload(name: str) -> OpOverload | None:
    """Find ATen's ``"op"`` or ``"op.overload"``; return None where this torch has none of that name."""
    base, _, variant = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return getattr(packet, variant or "default", None)


def rule(*names: str, on_rows: bool = False) -> Callable[[Rule], Rule]:
    """Register the decorated function for these ATen ops; a name that this torch does not have is passed over.

    Args:
        names: The ops, as :func:`overload` takes them.
        on_rows: Whether the function is asked only where the first argument still holds the selected rows alone.
    """

    def register(function: Rule) -> Rule:
        entry = _on_rows(function) if on_rows else function
        for name in names:
            op = overload(name)
            if op is not None:
                RULES[op] = entry
        return function

    return register


def _on_rows(function: Rule) -> Rule:
    def guarded(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return NotImplemented if getattr(args[0], "place", None) is None else function(func, args, kwargs)

    return guarded


@lru_cache(maxsize=1024)
def is_view(op: OpOverload) -> bool:
    """Tell whether what the op returns shares memory with its first argument, without having written to it."""
    returned = [r.alias_info for r in op._schema.returns]
    return not op._schema.is_mutable and any(alias is not None for alias in returned)


@lru_cache(maxsize=1024)
def runs_by_parts(op: OpOverload) -> bool:
    """Tell whether the op is nothing but a sequence of other ops, which may have rules."""
    name = op._schema.name + (f".{op._overloadname}" if op._overloadname != "default" else "")
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
