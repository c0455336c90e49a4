"""Elementwise ops: activations, products with masks and saved values, sums of gradients, dropout, dtype changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.partial.gradient import RowGradient, holds_rows, in_accumulate_grad, in_formula
from lightning_ast.core.partial.registry import rule

__all__ = ["run_pointwise"]

aten = torch.ops.aten
_DIRECT = {aten.mul.Tensor: torch.mul, aten.add.Tensor: torch.add, aten.div.Tensor: torch.div}
"""Python's own bindings, faster to call than the dispatcher's."""


def _operands(args: tuple[Any, ...], first: RowGradient) -> list[Any] | None:
    """Take the rows of each argument; return None where the arguments do not line up along the samples."""
    place = first.place
    assert place is not None
    operands = []
    for a in args:
        if type(a) is RowGradient:
            if a is not first and not first.lies_as(a):
                return None
            operands.append(a.data_rows)
        elif isinstance(a, Tensor) and a.dim() >= -place.from_end and (size := a.shape[place.from_end]) != 1:
            if size != place.size:
                if a.numel() == 0:  # a buffer that this device does without
                    operands.append(a)
                    continue
                return None
            operands.append(first.rows_of(a, a.dim() + place.from_end))
        else:
            operands.append(a)
    return operands


@rule(
    "neg", "mul.Scalar", "div.Scalar", "sigmoid_backward", "tanh_backward", "threshold_backward",
    "gelu_backward", "silu_backward", "elu_backward", "leaky_relu_backward", "hardtanh_backward",
    "hardswish_backward", "hardsigmoid_backward", "hardshrink_backward", "softshrink_backward", "softplus_backward",
    "mish_backward", "log_sigmoid_backward", "logit_backward", "rrelu_with_noise_backward", "native_dropout_backward",
)  # fmt: skip
def run_pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an elementwise op, broadcasting included, on the rows of all its tensors."""
    first = next(a for a in args if type(a) is RowGradient)
    if first.place is None:
        return NotImplemented
    operands = _operands(args, first)
    if operands is None:
        return NotImplemented
    return first.like(_DIRECT.get(func, func)(*operands, **kwargs))


@rule("mul.Tensor", "div.Tensor")
def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    both = type(args[0]) is RowGradient and type(args[1]) is RowGradient  # no derivative formula does this
    if both or (type(args[1]) is RowGradient and func is aten.div.Tensor):  # 0 / 0 in the rows that are not held
        return NotImplemented
    return run_pointwise(func, args, kwargs)


@rule("add.Tensor", "sub.Tensor", "add_.Tensor", "sub_.Tensor")
def _add(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[:2]
    if type(a) is not RowGradient or type(b) is not RowGradient or not a.lies_as(b):
        return NotImplemented  # what is added to the other rows must not be lost
    if func._schema.is_mutable:
        if not a.shares_memory():
            return NotImplemented
        func(a.data_rows, b.data_rows, **kwargs)
        return a
    return a.like(_DIRECT.get(func, func)(a.data_rows, b.data_rows, **kwargs))


@rule("mul_.Tensor", "mul_.Scalar", "div_.Tensor", "div_.Scalar", "neg_")
def _scale_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0]
    if not holds_rows(first) or any(type(a) is RowGradient for a in args[1:]):
        return NotImplemented
    operands = _operands(args, first)
    if operands is None or not first.shares_memory():
        return NotImplemented
    func(*operands, **kwargs)
    return first


@rule("masked_fill.Scalar", "masked_fill.Tensor", "masked_fill_.Scalar", "masked_fill_.Tensor")
def _masked_fill(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient, mask, value = args
    if type(gradient) is not RowGradient or type(value) is RowGradient or not _is_zero(value):
        return NotImplemented
    if func._schema.is_mutable:
        return _scale_in_place(func, args, kwargs)
    return run_pointwise(func, (gradient, mask, value), kwargs)


@rule("where.self")
def _where(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if type(args[0]) is RowGradient or not all(type(a) is RowGradient or _is_zero(a) for a in args[1:]):
        return NotImplemented
    return run_pointwise(func, args, kwargs)


def _is_zero(value: Any) -> bool:
    """Tell whether a value is known to be 0 without asking a device."""
    if not isinstance(value, Tensor):
        return bool(value == 0)
    if value.dim() == 0 and value.device.type == "cpu":
        return value.item() == 0
    node = torch._C._current_autograd_node()  # clamp's formula makes its zero on the device
    return value.dim() == 0 and node is not None and node.name().startswith("Clamp")


@rule("detach", "alias", "_to_copy", "clone", on_rows=True)
def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gradient = args[0]
    if in_accumulate_grad(gradient.rows):
        return NotImplemented  # a leaf's .grad is an ordinary tensor
    needed: dict[Any, int] = {torch.channels_last: 4, torch.channels_last_3d: 5}
    dimensions = needed.get(kwargs.get("memory_format"))
    if dimensions is not None and gradient.data_rows.dim() != dimensions:
        kwargs = {**kwargs, "memory_format": torch.preserve_format}
    return gradient.like(func(gradient.data_rows, **kwargs))


@rule("_conj", on_rows=True)
def _conjugate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry the conjugation out: below the level of this dispatch nobody looks at the lazy bit."""
    return args[0].like(torch.conj_physical(args[0].data_rows))


@rule("zero_", on_rows=True)
def _zero(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not args[0].shares_memory():
        return NotImplemented
    args[0].data_rows.zero_()
    return args[0]


@rule("copy_")
def _copy_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[:2]
    both = type(target) is RowGradient and type(source) is RowGradient
    if not both or not target.lies_as(source) or target.shape != source.shape or not target.shares_memory():
        return NotImplemented
    target.data_rows.copy_(source.data_rows)
    return target


@rule("isnan", "isinf", on_rows=True)
def _not_finite(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer anomaly detection; the zeros of the other rows are neither."""
    return args[0].like(func(args[0].data_rows))


@rule("_is_any_true", on_rows=True)
def _any(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0].data_rows)


@rule("_prelu_kernel_backward")
def _prelu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0]
    if not holds_rows(first) or (operands := _operands(args, first)) is None:
        return NotImplemented
    return tuple(first.like(out) for out in func(*operands, **kwargs))


@rule("is_same_size")
def _is_same_size(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].shape == args[1].shape


@rule("zeros_like", on_rows=True)
def _zeros_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make what sign, floor and the like pass on; a custom backward that will write into it gets an ordinary tensor."""
    if not in_formula():
        return NotImplemented
    return args[0].like(func(args[0].data_rows, **{k: v for k, v in kwargs.items() if k != "memory_format"}))


@rule("ones_like", "empty_like")
def _new_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = {k: v for k, v in kwargs.items() if k in ("dtype", "device") and v is not None}
    empty = args[0].data_rows.new_empty(args[0].shape, **given)
    return empty.fill_(1) if func._schema.name == "aten::ones_like" else empty


@rule("new_empty", "new_ones", "new_full")
def _new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0].data_rows, *args[1:], **kwargs)
