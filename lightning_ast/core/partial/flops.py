"""Counting what a partial backward really computes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_ast.core.partial.gradient import RowGradient
from lightning_ast.core.partial.memory import GradientMemory

__all__ = ["BackwardFlops", "RowOps", "compiled_parts", "uncounted"]


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
        for a in tree_leaves((args, kwargs)):
            if isinstance(a, (RowGradient, GradientMemory)):
                return type(a).__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


class BackwardFlops:
    """Counts a backward twice: as autograd sees it, at full shapes, and as it is run.

    Attributes:
        full: FLOPs of the backward over every row (a multiply-add counts as 2), once the context is left.
        executed: FLOPs that were run: the row-sized ops, and those that ran over all rows.

    Example:
        >>> import torch
        >>> from lightning_ast.core import select_rows
        >>> losses = torch.nn.Linear(8, 8)(torch.randn(10, 8)).square().sum(1)
        >>> loss = select_rows(losses, torch.tensor([4]))
        >>> with BackwardFlops() as flops:
        ...     loss.backward()
        >>> flops.executed, flops.full
        (128, 1280)
    """

    def __init__(self) -> None:
        self.full = self.executed = 0

    def __enter__(self) -> BackwardFlops:
        """Begin to count."""
        self._open = ExitStack()
        executed = self._open.enter_context(FlopCounterMode(display=False))
        self._open.enter_context(RowOps())
        self._counters = executed, self._open.enter_context(FlopCounterMode(display=False))
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop, and take the totals."""
        self.executed, self.full = (counter.get_total_flops() for counter in self._counters)
        self._open.close()


def uncounted(dense_ops: Iterable[str]) -> bool:
    """Whether costly ops are among those that ran over all rows which torch's FlopCounterMode has no formula for.

    Args:
        dense_ops: names, as :func:`lightning_ast.core.select_rows` counts them.
    """
    return any(kind in name for name in dense_ops for kind in ("rnn", "lstm", "gru"))


def compiled_parts(module: nn.Module) -> bool:
    """Whether something inside is compiled by ``torch.compile``: a counter would switch that off."""
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in module.modules())
