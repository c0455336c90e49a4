"""Loss functions with ``reduction="none"``: the first ops of a backward."""

from __future__ import annotations

from typing import Any

from lightning_ast.core.partial.gradient import holds_rows
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
def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    at = _REDUCTION_AT[func._schema.name.removeprefix("aten::")]
    return run_pointwise(func, args, kwargs) if len(args) > at and args[at] == 0 else NotImplemented


@rule("nll_loss_backward", "nll_loss2d_backward")
def _nll(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, scores, target, weight, reduction, *rest = args
    if not holds_rows(gradient, 0) or reduction != 0:
        return NotImplemented
    saved = gradient.rows_of(scores, 0), gradient.rows_of(target, 0)
    return gradient.moved(func(gradient.packed(), *saved, weight, reduction, *rest), 0)


@rule("multi_margin_loss_backward", "multilabel_margin_loss_backward")
def _margin(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, scores, target = args[:3]
    multilabel = func is overload("multilabel_margin_loss_backward")
    if not holds_rows(gradient, 0) or args[3 if multilabel else 6] != 0:
        return NotImplemented
    rest = [args[3], gradient.rows_of(args[4], 0)] if multilabel else args[3:]
    saved = gradient.rows_of(scores, 0), gradient.rows_of(target, 0)
    return gradient.moved(func(gradient.packed(), *saved, *rest), 0)
