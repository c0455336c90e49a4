"""Compiled functions run uncompiled while one is inside, in whichever order several leave."""

from __future__ import annotations

import pytest
import torch

from lightning_ast.core.dependence.trace import uncompiled


def compiles() -> bool:
    """Whether a function that torch.compile has not seen yet is compiled."""
    seen = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    return bool(seen)


def test_the_first_to_come_may_be_the_first_to_go() -> None:
    assert compiles()
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    assert not compiles()
    first.__exit__(None, None, None)
    assert not compiles(), "the second is still inside"
    second.__exit__(None, None, None)
    assert compiles()


def test_an_error_inside_restores_it() -> None:
    with pytest.raises(ValueError, match="inside"), uncompiled():
        raise ValueError("inside")
    assert compiles()
