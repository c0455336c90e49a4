"""Normalisation layers. LayerNorm, GroupNorm, RMSNorm and InstanceNorm treat every sample alone: exact.

BatchNorm in training mode couples the samples. Its backward subtracts from each row two means of the incoming gradient
over the batch, so rows without gradient receive some. ``batchnorm="selected"`` leaves those out and takes the two means
over the k selected rows, with the statistics of the full batch: an approximation that keeps BatchNorm's invariances (no
gradient along a shift of its input). ``batchnorm="exact"`` goes dense there, and so does all that lies
before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.partial.gradient import RowGradient
from lightning_ast.core.partial.registry import rule

__all__ = []

Args = tuple[Any, ...]
aten = torch.ops.aten


def _held(gradient: Any) -> bool:
    return type(gradient) is RowGradient and gradient.place is not None


@rule("native_layer_norm_backward")
def _layer_norm(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    gradient, value, shape, mean, rstd, *rest = args
    if not _held(gradient) or gradient.place.from_end >= -len(shape):
        return NotImplemented
    at = gradient.place.dim
    saved = gradient.rows_of(value, at), shape, gradient.rows_of(mean, at), gradient.rows_of(rstd, at)
    out, weight, bias = func(gradient.data_rows, *saved, *rest, **kwargs)
    return None if out is None else gradient.like(out), weight, bias


@rule("_fused_rms_norm_backward")
def _rms_norm(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    gradient, value, shape, rstd, *rest = args
    if not _held(gradient) or gradient.place.from_end >= -len(shape):
        return NotImplemented
    at = gradient.place.dim
    saved = gradient.rows_of(value, at), shape, gradient.rows_of(rstd, at)
    out, weight = func(gradient.data_rows, *saved, *rest, **kwargs)
    return None if out is None else gradient.like(out), weight


@rule("native_group_norm_backward")
def _group_norm(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    gradient, value, mean, rstd, weight, _, *rest = args
    if not _held(gradient) or gradient.place.dim != 0:
        return NotImplemented
    rows = gradient.data_rows
    saved = (gradient.rows_of(t, 0) for t in (value, mean, rstd))
    out, *parameters = func(rows, *saved, weight, rows.shape[0], *rest, **kwargs)
    return (None if out is None else gradient.like(out), *parameters)


@rule("native_batch_norm_backward")
def _batch_norm(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    gradient, value, weight, running_mean, running_var, mean, invstd, training, eps, mask = args
    if not _held(gradient):
        return NotImplemented
    if gradient.place.dim == 1 and gradient.shape[0] == 1:
        return _instance_norm(gradient, args)
    if gradient.place.dim != 0 or (training and gradient.rows.batchnorm == "exact"):
        return NotImplemented
    statistics = running_mean, running_var, mean, invstd
    return _selected(gradient, value, weight, statistics, training=training, eps=eps, mask=mask)


@rule("cudnn_batch_norm_backward", "miopen_batch_norm_backward")
def _cudnn_batch_norm(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    value, gradient, weight, running_mean, running_var, mean, invstd, eps = args[:8]
    if not _held(gradient) or gradient.place.dim != 0 or gradient.rows.batchnorm == "exact":
        return NotImplemented
    statistics = running_mean, running_var, mean, invstd
    return _selected(gradient, value, weight, statistics, training=True, eps=eps, mask=[True, True, True])


@rule("batch_norm_backward")
def _batch_norm_with_update(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    gradient, value, weight, running_mean, running_var, mean, invstd, training, eps, mask = args[:10]
    if not _held(gradient) or gradient.place.dim != 0 or (training and gradient.rows.batchnorm == "exact"):
        return NotImplemented
    statistics = running_mean, running_var, mean, invstd
    return _selected(gradient, value, weight, statistics, training=training, eps=eps, mask=mask)


def _selected(
    gradient: RowGradient, value: Tensor, weight: Any, statistics: Args, *, training: bool, eps: float, mask: Any
) -> Args:
    rows, saved = gradient.data_rows, gradient.rows_of(value, 0)
    out, *parameters = aten.native_batch_norm_backward(rows, saved, weight, *statistics, training, eps, mask)
    return (None if out is None else gradient.like(out), *parameters)


def _instance_norm(gradient: RowGradient, args: Args) -> Args:
    """InstanceNorm is BatchNorm over ``(1, B * C, ...)``: every channel of every sample has its own statistics."""
    rows = [gradient.rows_of(args[1], 1), *(None if t is None else gradient.rows_of(t, 0) for t in args[2:7])]
    outs = aten.native_batch_norm_backward(gradient.data_rows, *rows, *args[7:])
    return tuple(None if o is None else gradient.moved(o, 1 if i == 0 else 0) for i, o in enumerate(outs))
