"""Step 6, the table of row rules: which function runs a backward op over the selected rows alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch._ops import OpOverload

__all__ = ["RULES", "OpArgs", "OpKwargs", "RowRule", "has_rule", "is_view", "positional", "rule", "runs_by_parts"]

# Where an op may be any, its arguments may be anything: tensors, numbers, lists, types. Its rule alone knows them.
OpArgs: TypeAlias = tuple[Any, ...]
OpKwargs: TypeAlias = dict[str, Any]

_Rule = Callable[..., Any]
"""``(op, *args, **kwargs)`` as autograd called it, with a RowGradient or more among them; returns ``NotImplemented``
where they cannot be taken row by row."""


class RowRule(NamedTuple):
    """An op and its rule; ``on_rows`` and ``dim`` are those of :func:`rule`."""

    op: OpOverload
    run: _Rule
    on_rows: bool
    dim: int | None
    is_view: bool


RULES: dict[int, RowRule] = {}
"""By the identity of an op, because hashing one runs Python; filled by :mod:`lightning_ast.core.partial.rules`."""


def _overload(name: str) -> OpOverload | None:
    """Find ATen's ``"op"`` or ``"op.overload"``; return None where this torch has none of that name."""
    base, _, variant = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return getattr(packet, variant or "default", None)


def has_rule(name: str) -> bool:
    """Tell whether there is a rule for an op, by its name as a counter of dense ops has it: ``aten.add.Tensor``."""
    return id(_overload(name.removeprefix("aten."))) in RULES


def rule(*names: str, on_rows: bool = False, dim: int | None = None) -> Callable[[_Rule], _Rule]:
    """Register the decorated function for these ATen ops; a name that this torch does not have is passed over.

    With ``on_rows`` the function is asked only where the first argument still holds the selected rows alone, in
    dimension ``dim`` (None: in any).
    """

    def register(function: _Rule) -> _Rule:
        ops = [op for op in map(_overload, names) if op is not None]
        RULES.update({id(op): RowRule(op, function, on_rows, dim, is_view(op)) for op in ops})
        return function

    return register


def is_view(op: OpOverload) -> bool:
    """Tell whether what the op returns shares memory with its first argument, without having written to it."""
    returned = [r.alias_info for r in op._schema.returns]
    return not op._schema.is_mutable and any(alias is not None for alias in returned)


@lru_cache(maxsize=64)
def positional(op: OpOverload) -> list[str]:
    """Name the arguments of an op that are given by their position."""
    return [argument.name for argument in op._schema.arguments if not argument.kwarg_only]


@lru_cache(maxsize=1024)
def runs_by_parts(op: OpOverload) -> bool:
    """Tell whether the op is nothing but a sequence of other ops, which may have rules."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
