"""Loss functions with ``reduction="none"``: the first ops of a backward."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows
from lightning_ast.core.partial.registry import rule
from lightning_ast.core.partial.rules.pointwise import run_pointwise

__all__ = []

# Where each finds its reduction among its arguments. Reduced to one number, the gradient would be a scalar, and no row
# of a sample.
_REDUCTION_AT = {
    "mse_loss_backward": 3,
    "smooth_l1_loss_backward": 3,
    "huber_loss_backward": 3,
    "soft_margin_loss_backward": 3,
    "binary_cross_entropy_backward": 4,
}
_CLASS_REDUCTION_AT = {
    "nll_loss_backward": 4,
    "nll_loss2d_backward": 4,
    "multi_margin_loss_backward": 6,
    "multilabel_margin_loss_backward": 3,
}


@rule(*_REDUCTION_AT)
def _elementwise(func: OpOverload, *args: Any) -> Any:
    at = _REDUCTION_AT[func._schema.name.removeprefix("aten::")]
    return run_pointwise(func, *args) if len(args) > at and args[at] == 0 else NotImplemented


@rule(*_CLASS_REDUCTION_AT, on_rows=True, dim=0)
def _by_class(func: OpOverload, gradient: HeldRows, *args: Any) -> Any:
    name = func._schema.name.removeprefix("aten::")
    if args[_CLASS_REDUCTION_AT[name] - 1] != 0:
        return NotImplemented
    # The scores and the target have a row for each sample; so has what marks the targets of a multilabel margin.
    whole = (0, 1, 3) if name == "multilabel_margin_loss_backward" else (0, 1)
    saved = [gradient.rows_of(arg, 0) if position in whole else arg for position, arg in enumerate(args)]
    return gradient.moved(func(gradient.packed(), *saved), 0)
