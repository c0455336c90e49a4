"""Where a tensor and its shadow differ: a profile along each dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dependence", "changed_places", "compare", "independent_of_shape"]

_RELATIVE_NOISE = 1e-6  # of the largest value: kernels may round differently


@dataclass(frozen=True)
class Dependence:
    """Where a tensor depends on one sample.

    Args:
        shape: The tensor's shape.
        profiles: One ``(shape[d],)`` float64 tensor on the CPU for each dimension ``d``: the summed differences between
            the tensor and its shadow over the other dimensions, 0 where it is independent.
        independent: Whether no element depends on the sample.
    """

    shape: tuple[int, ...]
    profiles: tuple[Tensor, ...]
    independent: bool


def independent_of_shape(shape: tuple[int, ...]) -> Dependence:
    """Describe a tensor without any dependence."""
    return Dependence(shape, tuple(torch.zeros(size, dtype=torch.float64) for size in shape), independent=True)


def compare(real: Tensor, shadow: Tensor) -> Dependence:
    """Measure where a tensor and its shadow differ.

    Differences below a millionth of the largest value, or below two units in the last place, count as 0. A place that
    is NaN in both does not differ; one that is finite in only one of them differs by the largest value.

    Example:
        >>> compare(torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])).profiles[0]
        tensor([0., 0., 3.], dtype=torch.float64)
    """
    difference = changed_places(real, shadow)
    shape = tuple(real.shape)
    if not bool(difference.any()):
        return independent_of_shape(shape)
    exact = difference if difference.device.type == "mps" else difference.double()
    dims = range(exact.dim())
    profiles = [exact.sum([e for e in dims if e != d]) if len(dims) > 1 else exact for d in dims]
    return Dependence(shape, tuple(profile.cpu().double() for profile in profiles), independent=False)


def changed_places(real: Tensor, shadow: Tensor) -> Tensor:
    """Return the absolute differences of a tensor and its shadow, without those that may be rounding."""
    if not (real.is_floating_point() or real.is_complex()):
        return (real != shadow).float()
    if real.is_complex():
        parts = zip(*(torch.view_as_real(t.resolve_conj()).unbind(-1) for t in (real, shadow)), strict=True)
        return sum((changed_places(*part) for part in parts), torch.zeros((), device=real.device))
    unit = torch.finfo(real.dtype).eps
    wide = real.dtype if real.dtype is torch.float64 else torch.float32
    real, shadow = real.to(wide), shadow.to(wide)
    size = real.abs().nan_to_num(0.0, 0.0, 0.0)
    largest = size.amax() if size.numel() else size.new_zeros(())
    difference = (real - shadow).abs()
    difference = torch.where(difference > _RELATIVE_NOISE * largest + 2 * unit * size, difference, 0.0)
    odd = ~(torch.isfinite(real) & torch.isfinite(shadow))
    same = (real == shadow) | (real.isnan() & shadow.isnan())
    return torch.where(odd, torch.where(same, 0.0, largest.clamp(min=1.0)), difference)
