"""Step 4, one call of a torch loss function: remember it, and take it apart once a score is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_ast.core.entries.node_facts import RowOrder, row_order
from lightning_ast.core.losses.functions import CLASS_LOSSES, RULES, Elements
from lightning_ast.core.partial.registry import OpArgs, OpKwargs
from lightning_ast.errors import LossCaptureError

__all__ = ["REMEDY", "WatchedCall", "class_labels", "fold", "widen"]

REMEDY = (
    "Use significance='gradient' (the default), which needs no torch loss function. Or define "
    "`per_sample_loss(self, batch, batch_idx)` on your module and return the unreduced losses, shape (B,)."
)
_PARAMETERS = {func: inspect.signature(func).parameters for func in RULES}
_DEFAULTS = {
    func: {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    for func, parameters in _PARAMETERS.items()
}


@dataclass(eq=False)
class WatchedCall:
    """One call of a loss function."""

    func: Callable[..., Tensor]
    args: OpArgs
    kwargs: OpKwargs
    output: Tensor | None  # None where the capture stopped there
    counted: bool  # whether the call may enter a score: it was not under the user's own `torch.no_grad`

    def __post_init__(self) -> None:
        output = self.output
        # Where the gradient of the output enters the graph. It stays the same if the output is changed in place later
        # (`loss += penalty`).
        self.edge = None if output is None or not output.requires_grad else get_gradient_edge(output)
        self._versions = _versions(self.args, self.kwargs)

    @property
    def name(self) -> str:
        """Return the name of the loss function."""
        return self.func.__name__

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Return all arguments by name, in the order of the function's parameters, defaults included."""
        # Signature.bind does the same in ten times the time, and a score is made in every batch.
        names = _PARAMETERS[self.func]
        known = {**_DEFAULTS[self.func], **dict(zip(names, self.args, strict=False)), **self.kwargs}
        return {name: known[name] for name in names if name in known}

    @property
    def reduction(self) -> str:
        """Return the reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``."""
        return str(self.arguments["reduction"])

    @property
    def changed(self) -> bool:
        """Tell whether a tensor among the arguments was changed in place after the call."""
        return self._versions != _versions(self.args, self.kwargs)

    def labels(self, batch_size: int) -> Tensor | None:
        """Return the class indices ``(B,)`` that the loss was given, -1 for those to ignore; None where it has none."""
        if self.func not in CLASS_LOSSES or self.changed:  # targets that were changed since are others
            return None
        ignore_index = self.arguments["ignore_index"]
        return class_labels(self.arguments["target"], -100 if ignore_index is None else ignore_index, batch_size)

    def take_apart(self, batch_size: int) -> Elements:
        """Compute the elements that the call reduced, in at least 32 bits; with a graph where gradients are enabled.

        Raises:
            LossCaptureError: They cannot be had, or which of the ``batch_size`` samples each belongs to is not known.
        """
        if self.arguments.get("size_average") is not None or self.arguments.get("reduce") is not None:
            raise LossCaptureError(
                f"`{self.name}` was called with the deprecated size_average/reduce: use `reduction=` instead."
            )
        if self.changed:
            raise LossCaptureError(
                f"a tensor that `{self.name}` was given was changed in place after it: change a copy. Or: {REMEDY}"
            )
        # autocast would have computed these losses in float32, and it is not on any more
        elements = RULES[self.func](self.func, {name: widen(value) for name, value in self.arguments.items()})
        values = elements.values
        if values.ndim > 0 and elements.logits is not None and values.shape[0] != batch_size:
            given = next(iter(self.arguments.values()))
            _check_order(row_order(given, batch_size), self.name)
        return elements

    def divisor(self, elements: Elements) -> Tensor | int:
        """Return what the call's own reduction divides the sum of its elements by: 1 for ``"sum"``."""
        if self.reduction == "sum":
            return 1
        return elements.values.numel() if self.reduction == "none" else elements.divisor


def widen(value: Any) -> Any:
    """Turn a tensor of 16 bits into one of 32, and leave everything else."""
    low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if low else value


def fold(values: Tensor, batch_size: int, name: str) -> Tensor:
    """Add the elements ``(N, ...)`` of each sample up, to ``(B,)``; N is B or B * T with the samples outermost."""
    if values.ndim == 0 or values.shape[0] == 0 or values.shape[0] % batch_size != 0:
        raise LossCaptureError(
            f"expected the losses of `{name}` to have a leading dimension of {batch_size} (the batch size) or a "
            f"multiple of it (tokens), got shape {tuple(values.shape)}. {REMEDY}"
        )
    return values if values.shape == (batch_size,) else values.reshape(batch_size, -1).sum(1)


def class_labels(targets: Tensor, ignore_index: int | None, batch_size: int) -> Tensor | None:
    """Return ``targets`` if they are class indices ``(B,)``, with -1 in place of ``ignore_index``; otherwise None."""
    if targets.shape != (batch_size,) or targets.is_floating_point():
        return None
    if ignore_index is None:
        return targets
    return targets.where(targets != ignore_index, torch.full_like(targets, -1))


def _check_order(order: RowOrder, name: str) -> None:
    if order == "picked":
        raise LossCaptureError(
            f"the rows that `{name}` is given were picked by an index or a mask, so which sample each belongs to is "
            f"not known: keep all rows and use `ignore_index`. Or: {REMEDY}"
        )
    if order == "joined":
        raise LossCaptureError(
            f"`{name}` is given several rows a sample that do not lie together (views joined along the batch, time "
            f"first, ensembles, chunks): flatten with the samples outermost, `(B, T, C)` to `(B * T, C)`. Or: {REMEDY}"
        )


def _versions(args: OpArgs, kwargs: OpKwargs) -> tuple[int, ...]:
    """Count the changes in place of the tensors; inference tensors do not count theirs."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)
