"""Elementwise ops: losses, activations, products with saved values, sums of gradients, dropout, dtype changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows, RowGradient, holds_rows, in_accumulate_grad, in_formula
from lightning_ast.core.partial.registry import OpArgs, positional, rule

__all__ = []

aten = torch.ops.aten
_DIRECT: dict[int, Callable[..., Tensor]] = {
    id(aten.mul.Tensor): torch.mul,
    id(aten.add.Tensor): torch.add,
    id(aten.div.Tensor): torch.div,
    # Carried out: below the level of this dispatch nobody looks at the lazy bit.
    id(aten._conj.default): torch.conj_physical,
}
"""What is called in place of some ops, by their identity: Python's own bindings are faster than the dispatcher's."""


def _operands(args: OpArgs, first: HeldRows) -> list[Any] | None:
    """Take the rows of each argument; return None where the arguments do not line up along the samples."""
    place = first.place
    operands = []
    for a in args:
        if type(a) is RowGradient:
            if a is not first and not first.lies_as(a):
                return None
            operands.append(a.data_rows)
        # What has no dimension of the samples, or one of size 1, broadcasts against any number of rows.
        elif isinstance(a, Tensor) and a.dim() >= -place.from_end and (size := a.shape[place.from_end]) != 1:
            if size != place.size and a.numel() > 0:  # an empty one is a buffer that this device does without
                return None
            operands.append(first.rows_of(a, a.dim() + place.from_end) if size == place.size else a)
        else:
            operands.append(a)
    return operands


@rule(
    "neg", "mul.Scalar", "div.Scalar", "sigmoid_backward", "tanh_backward", "threshold_backward",
    "gelu_backward", "silu_backward", "elu_backward", "leaky_relu_backward", "hardtanh_backward",
    "hardswish_backward", "hardsigmoid_backward", "hardshrink_backward", "softshrink_backward", "softplus_backward",
    "mish_backward", "log_sigmoid_backward", "logit_backward", "rrelu_with_noise_backward", "native_dropout_backward",
    "_conj", "isnan", "isinf",  # by the last two anomaly detection asks; the zeros of the other rows are neither
)  # fmt: skip
def _pointwise(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run an elementwise op, broadcasting included, on the rows of all its tensors."""
    first = args[0] if type(args[0]) is RowGradient else next(a for a in args if type(a) is RowGradient)
    operands = _operands(args, first) if holds_rows(first) else None
    if operands is None:
        return NotImplemented
    run: Callable[..., Tensor] = _DIRECT.get(id(func), func)
    return first.like(run(*operands, **kwargs))


@rule("mul.Tensor", "div.Tensor")
def _product(func: OpOverload, a: Any, b: Any) -> Any:
    # No derivative formula multiplies two gradients; by one, the rows that are not held would be 0 / 0.
    if type(b) is RowGradient and (type(a) is RowGradient or func is aten.div.Tensor):
        return NotImplemented
    return _pointwise(func, a, b)


@rule("add.Tensor", "sub.Tensor", "add_.Tensor", "sub_.Tensor", "copy_")
def _combine(func: OpOverload, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    if type(a) is not RowGradient or type(b) is not RowGradient or not a.lies_as(b):
        return NotImplemented  # what other rows are given must not be lost
    if func._schema.is_mutable:
        if not a.shares_memory():
            return NotImplemented
        func(a.data_rows, b.data_rows, *args, **kwargs)
        return a
    return _pointwise(func, a, b, **kwargs)


@rule("mul_.Tensor", "mul_.Scalar", "div_.Tensor", "div_.Scalar", "neg_", "zero_", on_rows=True)
def _scale_in_place(func: OpOverload, gradient: HeldRows, *others: Any) -> Any:
    operands = None if RowGradient in map(type, others) else _operands((gradient, *others), gradient)
    if operands is None or not gradient.shares_memory():
        return NotImplemented
    func(*operands)
    return gradient


@rule("masked_fill.Scalar", "masked_fill.Tensor", "masked_fill_.Scalar", "masked_fill_.Tensor", on_rows=True)
def _masked_fill(func: OpOverload, gradient: HeldRows, mask: Tensor, value: Any) -> Any:
    if type(value) is RowGradient or not _is_zero(value):
        return NotImplemented
    return (_scale_in_place if func._schema.is_mutable else _pointwise)(func, gradient, mask, value)


@rule("where.self")
def _where(func: OpOverload, condition: Tensor, a: Tensor, b: Tensor) -> Any:
    if type(condition) is RowGradient or not all(type(part) is RowGradient or _is_zero(part) for part in (a, b)):
        return NotImplemented
    return _pointwise(func, condition, a, b)


def _is_zero(value: Any) -> bool:
    """Tell whether a value is known to be 0 without asking a device."""
    if not isinstance(value, Tensor):
        return bool(value == 0)
    if value.dim() == 0 and value.device.type == "cpu":
        return value.item() == 0
    node = torch._C._current_autograd_node()  # clamp's formula makes its zero on the device
    return value.dim() == 0 and node is not None and node.name().startswith("Clamp")


@rule("detach", "alias", "_to_copy", "clone", on_rows=True)
def _copy(func: OpOverload, gradient: HeldRows, **kwargs: Any) -> Any:
    if in_accumulate_grad(gradient.rows):
        return NotImplemented  # a leaf's .grad is an ordinary tensor
    return gradient.like(func(gradient.data_rows, **kwargs))


@rule("_prelu_kernel_backward", on_rows=True)
def _prelu(func: OpOverload, gradient: HeldRows, *saved: Tensor) -> Any:
    operands = _operands((gradient, *saved), gradient)
    return NotImplemented if operands is None else tuple(gradient.like(out) for out in func(*operands))


@rule("is_same_size")
def _is_same_size(func: OpOverload, a: Tensor, b: Tensor) -> Any:
    return a.shape == b.shape


@rule("zeros_like", on_rows=True)
def _zeros_like(func: OpOverload, gradient: HeldRows, **kwargs: Any) -> Any:
    """Make what sign, floor and the like pass on; a custom backward that will write into it gets an ordinary tensor."""
    if not in_formula():
        return NotImplemented
    kwargs.pop("memory_format", None)  # of the full tensor: the rows may have fewer dimensions
    return gradient.like(func(gradient.data_rows, **kwargs))


@rule("ones_like", "empty_like")
def _new_like(func: OpOverload, gradient: RowGradient, **kwargs: Any) -> Any:
    given = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
    # Ordinary memory: ones are not zero outside the selected rows, and what fills an empty tensor is not known.
    empty = gradient.data_rows.new_empty(gradient.shape, **given)
    return empty.fill_(1) if func._schema.name == "aten::ones_like" else empty


@rule("new_empty", "new_ones", "new_full", "_is_any_true")
def _no_gradient(func: OpOverload, gradient: RowGradient, *args: Any, **kwargs: Any) -> Any:
    return func(gradient.data_rows, *args, **kwargs)


def _is_reduced(func: OpOverload, args: OpArgs) -> bool:
    """Tell whether a loss was reduced to one number, so that its gradient is a scalar, and no row of a sample."""
    at = positional(func).index("reduction")
    return len(args) <= at or args[at] != 0  # the last argument of some, with the mean as its default


@rule(
    "mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward", "soft_margin_loss_backward",
    "binary_cross_entropy_backward",
)  # fmt: skip
def _elementwise(func: OpOverload, *args: Any) -> Any:
    return NotImplemented if _is_reduced(func, args) else _pointwise(func, *args)


@rule(
    "nll_loss_backward", "nll_loss2d_backward", "multi_margin_loss_backward", "multilabel_margin_loss_backward",
    on_rows=True, dim=0,
)  # fmt: skip
def _by_class(func: OpOverload, gradient: HeldRows, *args: Any) -> Any:
    if _is_reduced(func, (gradient, *args)):
        return NotImplemented
    # The scores and the target have a row for each sample; so has what marks the targets of a multilabel margin.
    whole = (0, 1, 3) if func._schema.name == "aten::multilabel_margin_loss_backward" else (0, 1)
    saved = [gradient.rows_of(arg, 0) if position in whole else arg for position, arg in enumerate(args)]
    return gradient.moved(func(gradient.packed(), *saved), 0)
