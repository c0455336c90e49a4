"""Loss functions with ``reduction="none"``: the first ops of a backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows
from lightning_ast.core.partial.registry import overload, rule
from lightning_ast.core.partial.rules.pointwise import run_pointwise

__all__ = []

_REDUCTION_AT = {
    "mse_loss_backward": 3,
    "smooth_l1_loss_backward": 3,
    "huber_loss_backward": 3,
    "soft_margin_loss_backward": 3,
    "binary_cross_entropy_backward": 4,
}


@rule(*_REDUCTION_AT)
def _elementwise(func: OpOverload, *args: Any) -> Any:
    # Reduced to one number, the gradient would be a scalar, and no row of a sample.
    at = _REDUCTION_AT[func._schema.name.removeprefix("aten::")]
    return run_pointwise(func, *args) if len(args) > at and args[at] == 0 else NotImplemented


@rule("nll_loss_backward", "nll_loss2d_backward", on_rows=True, dim=0)
def _nll(func: OpOverload, gradient: HeldRows, scores: Tensor, target: Tensor, *rest: Any) -> Any:
    if rest[1] != 0:  # `rest` begins with the class weights and the reduction
        return NotImplemented
    saved = gradient.rows_of(scores, 0), gradient.rows_of(target, 0)
    return gradient.moved(func(gradient.packed(), *saved, *rest), 0)


@rule("multi_margin_loss_backward", "multilabel_margin_loss_backward", on_rows=True, dim=0)
def _margin(func: OpOverload, gradient: HeldRows, scores: Tensor, target: Tensor, *rest: Any) -> Any:
    multilabel = func is overload("multilabel_margin_loss_backward")
    if rest[0 if multilabel else 3] != 0:
        return NotImplemented
    if multilabel:  # the last argument marks which classes are targets, a row for each sample
        rest = rest[0], gradient.rows_of(rest[1], 0)
    saved = gradient.rows_of(scores, 0), gradient.rows_of(target, 0)
    return gradient.moved(func(gradient.packed(), *saved, *rest), 0)
