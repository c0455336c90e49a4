"""Convolution, pooling, padding, interpolation and grid sampling: samples along the first dimension, folded or not."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from lightning_ast.core.partial.gradient import HeldRows
from lightning_ast.core.partial.registry import rule

__all__ = []


@rule("convolution_backward", on_rows=True, dim=0)
def _convolution(func: OpOverload, gradient: HeldRows, value: Tensor, *rest: Any) -> Any:
    if value.shape[0] != gradient.shape[0]:  # without a batch dimension the first one is of channels
        return NotImplemented
    out, weight, bias = func(gradient.data_rows, gradient.rows_of(value, 0), *rest)
    return None if out is None else gradient.moved(out, 0), weight, bias


@rule(
    "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "avg_pool2d_backward",
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward",
    "reflection_pad3d_backward", "replication_pad1d_backward", "replication_pad2d_backward",
    "replication_pad3d_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
    on_rows=True, dim=0,
)  # fmt: skip
def _sampled(func: OpOverload, gradient: HeldRows, value: Tensor, *rest: Any) -> Any:
    """Run it on the gathered rows of what was saved; without a batch dimension it runs densely."""
    if value.dim() != gradient.dim() or value.shape[0] != gradient.shape[0]:
        return NotImplemented
    saved = [gradient.rows_of(a, 0) if isinstance(a, Tensor) else a for a in (value, *rest)]
    out = func(gradient.packed(), *saved)
    if isinstance(out, tuple):
        return tuple(None if o is None else gradient.moved(o, 0) for o in out)
    return gradient.moved(out, 0)


@rule(
    "upsample_nearest1d_backward", "upsample_nearest2d_backward", "upsample_nearest3d_backward",
    "_upsample_nearest_exact1d_backward", "_upsample_nearest_exact2d_backward", "_upsample_nearest_exact3d_backward",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward",
    "_upsample_lanczos2d_aa_backward", on_rows=True, dim=0,
)  # fmt: skip
def _upsample(func: OpOverload, gradient: HeldRows, out_size: list[int], in_size: list[int], *rest: Any) -> Any:
    if in_size[0] != gradient.shape[0]:
        return NotImplemented
    # The sizes of the input are an argument of their own, and begin with the number of samples.
    rows = gradient.packed()
    return gradient.moved(func(rows, out_size, [rows.shape[0], *in_size[1:]], *rest), 0)
