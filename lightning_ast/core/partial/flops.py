"""Counting what a partial backward really computes."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_ast.core.partial.gradient import RowGradient

__all__ = ["RowOps"]


class RowOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows the dispatch modes around it the row-sized ops of a partial backward.

    A mode such as torch's FlopCounterMode sees a row gradient's full shape and reports a dense backward. With this one
    inside, it sees the ops that are run in its place.

    Example:
        >>> import torch
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> from lightning_ast.core import select_rows
        >>> layer = torch.nn.Linear(8, 8)
        >>> losses = layer(torch.randn(10, 8)).square().sum(1)
        >>> loss = select_rows(losses, torch.tensor([4]))
        >>> with FlopCounterMode(display=False) as counter, RowOps():
        ...     loss.backward()
        >>> counter.get_total_flops()  # of the weight's gradient: 2 * 8 * 8 for 1 of 10 rows
        128
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hand row gradients to their rules with the outer modes still on."""
        kwargs = kwargs or {}
        if any(isinstance(a, RowGradient) for a in tree_leaves((args, kwargs))):
            return RowGradient.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)
