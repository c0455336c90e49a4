"""Each row rule takes what its op is called with, also where only another device or version of torch calls it."""

from __future__ import annotations

import inspect

import pytest
from torch._ops import OpOverload

from lightning_ast.core.partial.registry import RULES


@pytest.mark.parametrize("op", [entry.op for entry in RULES.values()], ids=str)
def test_a_rule_takes_the_arguments_of_its_op(op: OpOverload) -> None:
    signature = inspect.signature(RULES[id(op)].run)
    positional = [argument for argument in op._schema.arguments if not argument.kwarg_only]
    named = {argument.name: None for argument in op._schema.arguments if argument.kwarg_only}
    required = sum(not argument.has_default_value() for argument in positional)
    for count in range(required, len(positional) + 1):
        signature.bind(op, *[None] * count)
        signature.bind(op, *[None] * count, **named)
