"""Step 0a of a batch: samples that hold NaN or infinity, and other samples in their place.

What stands in such a sample's place is a copy of a sample of the same batch, so that nothing that mixes samples (the
statistics of BatchNorm above all) sees it. That the copy is not trained on is the gate's part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["all_finite", "finite_samples", "replace_samples"]


def all_finite(values: Tensor) -> bool:
    """Tell whether every value is finite, in one pass where it is so; waits for the device.

    Example:
        >>> all_finite(torch.ones(3)), all_finite(torch.tensor([1.0, float("nan")]))
        (True, False)
    """
    total = values if values.ndim == 0 else values.sum()
    return math.isfinite(total.item()) or bool(values.isfinite().all())  # the sum of finite values may overflow


def finite_samples(values: Tensor) -> Tensor:
    """Which samples hold finite values alone; no device is waited for.

    Args:
        values: ``(B, ...)``.

    Returns:
        ``(B,)`` bool.

    Example:
        >>> finite_samples(torch.tensor([[1.0, 2.0], [float("inf"), 0.0]]))
        tensor([ True, False])
    """
    return values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()


def replace_samples(values: Tensor, finite: Tensor) -> Tensor:
    """Put the first finite sample in the place of those that are not; no device is waited for.

    Args:
        values: ``(B, ...)`` of any type; any other shape is given back as it is.
        finite: ``(B,)`` bool, on any device.

    Returns:
        Of the same shape, type and memory format. Without a finite sample, NaN and infinity become 0.

    Example:
        >>> replace_samples(torch.tensor([7, 8, 9]), torch.tensor([False, True, False]))
        tensor([8, 8, 8])
    """
    if values.ndim == 0 or values.shape[0] != finite.numel():
        return values
    finite = finite.to(values.device)
    first = values.index_select(0, finite.to(torch.uint8).argmax().reshape(1))
    if first.is_floating_point():
        first = first.nan_to_num(0.0, 0.0, 0.0)
    return torch.where(finite.reshape(-1, *[1] * (values.ndim - 1)), values, first)
