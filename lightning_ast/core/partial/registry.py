"""The table of row rules: which function runs a backward op over the selected rows alone."""

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
    """ATen's ``"op"`` or ``"op.overload"``, or None where this torch has none of that name."""
    base, _, variant = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return getattr(packet, variant or "default", None)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function for these ATen ops; a name that this torch does not have is passed over."""

    def register(function: Rule) -> Rule:
        for name in names:
            op = overload(name)
            if op is not None:
                RULES[op] = function
        return function

    return register


@lru_cache(maxsize=1024)
def is_view(op: OpOverload) -> bool:
    """Whether what the op returns shares memory with its first argument, without having written to it."""
    returned = [r.alias_info for r in op._schema.returns]
    return not op._schema.is_mutable and any(alias is not None for alias in returned)


@lru_cache(maxsize=1024)
def runs_by_parts(op: OpOverload) -> bool:
    """Whether the op is nothing but a sequence of other ops, which may have rules."""
    name = op._schema.name + (f".{op._overloadname}" if op._overloadname != "default" else "")
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
