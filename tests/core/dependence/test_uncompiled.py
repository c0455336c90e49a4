"""Compiled functions run uncompiled while one is inside, also where several are."""

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


def test_one_may_be_inside_another() -> None:
    assert compiles()
    with uncompiled():
        with uncompiled():
            assert not compiles()
        assert not compiles()
    assert compiles()


def test_an_error_inside_restores_it() -> None:
    with pytest.raises(ValueError, match="inside"), uncompiled():
        raise ValueError("inside")
    assert compiles()
