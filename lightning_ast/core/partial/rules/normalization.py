"""Normalisation layers. LayerNorm, GroupNorm, RMSNorm and InstanceNorm treat every sample alone: exact.

BatchNorm in training mode couples the samples: its backward takes from each row the part of the incoming gradient that
is constant over the batch, and the part along the normalised input, so that rows without gradient receive some.
``batchnorm="selected"`` leaves those rows out and takes the two parts over the k selected rows: an approximation. As in
the exact gradient, nothing is left along a shift or a scale of the input; with the full batch's mean and deviation in
the place of the selected rows' own that would not hold. Along a CIFAR-10 training of ResNet-9 with B = 256 the cosine
of all gradients to the exact ones was above 0.98, 0.97 and 0.90 at k / B = 0.4, 0.2 and 0.1, and the accuracy after 16
epochs at 0.4 was within half a point of exact masking. ``batchnorm="exact"`` goes dense there, and so does all that
lies before; so does a layer that has fewer than 16 values a channel for the parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows, holds_rows
from lightning_ast.core.partial.registry import rule

__all__ = ["FEWEST_VALUES", "is_batchnorm"]

aten = torch.ops.aten
FEWEST_VALUES = 16
"""Values of a channel among the selected rows that BatchNorm's two means are taken from, at least."""
_BATCHNORM = ("native_batch_norm_backward", "cudnn_batch_norm_backward", "miopen_batch_norm_backward")
_BATCHNORM_WITH_UPDATE = "batch_norm_backward"


def is_batchnorm(name: str) -> bool:
    """Tell whether an op that ran over all rows is the backward of BatchNorm, which has a rule."""
    return name.removeprefix("aten.").partition(".")[0] in (*_BATCHNORM, _BATCHNORM_WITH_UPDATE)


@rule("native_layer_norm_backward", "_fused_rms_norm_backward", on_rows=True)
def _layer_norm(
    func: OpOverload, gradient: HeldRows, value: Tensor, shape: list[int], *rest: Any, **kwargs: Any
) -> Any:
    if gradient.place.from_end >= -len(shape):  # the samples are among what is normalised together
        return NotImplemented
    at = gradient.place.dim
    count = 2 if func._schema.name == "aten::native_layer_norm_backward" else 1  # the mean and rstd, or rstd alone
    statistics = [gradient.rows_of(saved, at) for saved in rest[:count]]
    saved = gradient.rows_of(value, at), shape, *statistics, *rest[count:]
    out, *parameters = func(gradient.packed(), *saved, **kwargs)
    return (None if out is None else gradient.like(out), *parameters)


@rule("native_group_norm_backward", on_rows=True, dim=0)
def _group_norm(func: OpOverload, gradient: HeldRows, *args: Any, **kwargs: Any) -> Any:
    value, mean, rstd, weight, _, *rest = args
    rows = gradient.packed()
    saved = (gradient.rows_of(t, 0) for t in (value, mean, rstd))
    # The number of samples is an argument of its own, and is now that of the selected ones.
    out, *parameters = func(rows, *saved, weight, rows.shape[0], *rest, **kwargs)
    return (None if out is None else gradient.like(out), *parameters)


@rule(_BATCHNORM[0])
def _batch_norm(func: OpOverload, gradient: Tensor, value: Tensor, *rest: Any) -> Any:
    weight, running_mean, running_var, mean, invstd, training, eps, mask = rest
    if not holds_rows(gradient):
        return NotImplemented
    if gradient.place.dim == 1 and gradient.shape[0] == 1:  # the shape that InstanceNorm gives BatchNorm
        return _instance_norm(gradient, value, *rest)
    if gradient.place.dim != 0:
        return NotImplemented
    if training:  # by the batch's statistics; in evaluation each sample stands alone
        return _selected(gradient, value, weight, mean, invstd, eps, mask)
    saved = gradient.rows_of(value, 0), weight, running_mean, running_var, mean, invstd
    out, *parameters = func(gradient.packed(), *saved, training, eps, mask)
    return (None if out is None else gradient.like(out), *parameters)


@rule(*_BATCHNORM[1:])
def _cudnn_batch_norm(func: OpOverload, value: Tensor, gradient: Tensor, *rest: Any) -> Any:
    *statistics, eps = rest[:6]  # behind them lies what the kernel has reserved, which torch's own does without
    native = aten.native_batch_norm_backward.default
    return _batch_norm(native, gradient, value, *statistics, True, eps, [True, True, True])


@rule(_BATCHNORM_WITH_UPDATE)
def _batch_norm_with_update(func: OpOverload, *args: Any) -> Any:
    return _batch_norm(aten.native_batch_norm_backward.default, *args[:10])


def _selected(
    gradient: HeldRows, value: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, eps: float, mask: list[bool]
) -> Any:
    """Run BatchNorm's backward over the selected rows, centred and scaled by their own statistics."""
    rows = gradient.packed()
    saved = gradient.rows_of(value, 0)
    if gradient.rows.batchnorm == "exact" or rows.numel() < FEWEST_VALUES * rows.shape[1]:
        return NotImplemented
    # Running statistics, which are not used; on a CPU the result has their type where it differs.
    alike = saved.is_cuda or saved.dtype == mean.dtype
    unused: Any = (None, None) if alike else (torch.zeros_like(mean), torch.ones_like(mean))
    center, variance = torch.batch_norm_update_stats(saved, unused[0], unused[1], 0.0)  # faster than var_mean
    spread = variance.add_(eps).rsqrt_()
    # The derivative of the normalised value is the full batch's invstd: it enters through the weight.
    scale = invstd / spread if weight is None else (invstd / spread).mul_(weight)
    out, by_own, total = aten.native_batch_norm_backward(
        rows, saved, _of_type(scale, mean), None, None, center, spread, True, eps, [mask[0], True, True]
    )
    # The weight's own gradient is exact: sum(g * (x - mean) * invstd) over the rows that have a gradient.
    weight_gradient = by_own.div_(spread).add_((center - mean).mul_(total)).mul_(invstd)
    return (
        gradient.like(out) if mask[0] else None,
        _of_type(weight_gradient, weight) if mask[1] and weight is not None else None,
        _of_type(total, weight) if mask[2] and weight is not None else None,
    )


def _of_type(values: Tensor, other: Tensor) -> Tensor:
    return values if values.dtype == other.dtype else values.to(other.dtype)


def _instance_norm(gradient: HeldRows, value: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """Run InstanceNorm's backward: BatchNorm's over ``(1, B * C, ...)``, where each sample's channels stand alone."""
    weight_and_statistics = (t if t is None or t.numel() == 0 else gradient.rows_of(t, 0) for t in rest[:5])
    saved = gradient.rows_of(value, 1), *weight_and_statistics, *rest[5:]
    outs = aten.native_batch_norm_backward(gradient.packed(), *saved)
    return tuple(None if o is None else gradient.moved(o, 1 if i == 0 else 0) for i, o in enumerate(outs))
