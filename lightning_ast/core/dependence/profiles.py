"""Step 2, the result for one tensor: where it differs from its shadow, as a profile along each dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dependence", "changed_places", "compare", "independent_of_shape"]

_RELATIVE_NOISE = 1e-6  # of the largest value: kernels may round differently
_RELATIVE_NOISE_DOUBLE = 1e-14
_OUTLIER = 1e3  # times the largest value that differs: above that, a value is a mask's (-1e9), and no measure of noise


@dataclass(frozen=True)
class Dependence:
    """Where a tensor depends on one sample.

    Attributes:
        shape: The tensor's shape.
        profiles: For each dimension ``d`` the summed differences over all others, ``(shape[d],)`` float64 on the CPU.
        independent: Whether it is known that no element changes with the sample: NaN hides it.
        touched: Whether it was computed from something of the sample all the same: a margin, a shared code.
        picked: Whether values chose its rows one by one, so that their number says nothing of the samples.
    """

    shape: tuple[int, ...]
    profiles: tuple[Tensor, ...]
    independent: bool
    touched: bool = True
    picked: bool = False


def independent_of_shape(shape: tuple[int, ...]) -> Dependence:
    """Describe a tensor that nothing of the sample went into."""
    profiles = tuple(torch.zeros(size, dtype=torch.float64) for size in shape)
    return Dependence(shape, profiles, independent=True, touched=False)


def compare(real: Tensor, shadow: Tensor) -> Dependence:
    """Measure where a tensor and its shadow differ."""
    shape = tuple(real.shape)
    box = _box(real != shadow)  # the rest of a large tensor need not be looked at
    profiles = [torch.zeros(size, dtype=torch.float64) for size in shape]
    if box is None:
        return Dependence(shape, tuple(profiles), independent=True)
    difference = changed_places(real[box], shadow[box], largest=_scale(real, real[box], shadow[box]))
    for d, profile in enumerate(profiles):
        others = [e for e in range(len(shape)) if e != d]
        summed = difference.double() if difference.device.type != "mps" else difference  # which has no float64
        profile[box[d]] = (summed.sum(others) if others else summed).cpu().double()
    hidden = bool(real[box].isnan().any())  # as in the mean of losses of which another sample's is NaN
    return Dependence(shape, tuple(profiles), independent=not hidden and not bool(difference.any()))


def changed_places(real: Tensor, shadow: Tensor, *, largest: Tensor | None = None) -> Tensor:
    """Return the absolute differences of (a part of) a tensor and its shadow, without those that may be rounding.

    ``largest`` is the largest absolute value of the whole tensor, apart from masks; None computes it.
    """
    if not (real.is_floating_point() or real.is_complex()):
        return (real != shadow).float()
    if largest is None:
        largest = _scale(real, real, shadow)
    if real.is_complex():
        parts = zip(*(torch.view_as_real(t.resolve_conj()).unbind(-1) for t in (real, shadow)), strict=True)
        return torch.stack([changed_places(*part, largest=largest) for part in parts]).sum(0)
    unit = torch.finfo(real.dtype).eps
    wide = real.dtype if real.dtype is torch.float64 else torch.float32
    real = real.to(wide)
    shadow = shadow.to(wide)
    size = real.abs().nan_to_num(0.0, 0.0, 0.0)
    difference = (real - shadow).abs()
    noise = _RELATIVE_NOISE_DOUBLE if wide is torch.float64 else _RELATIVE_NOISE
    # Another batch may take another kernel, which rounds differently: such differences would belong to every sample.
    difference = torch.where(difference > noise * largest + 2 * unit * size, difference, 0.0)
    # Infinity and NaN have no difference to compare: they differ where one of the two is finite, or another infinity.
    odd = ~(torch.isfinite(real) & torch.isfinite(shadow))
    same = (real == shadow) | (real.isnan() & shadow.isnan())
    return torch.where(odd, torch.where(same, 0.0, largest.clamp(min=1.0)), difference)


def _box(changed: Tensor) -> tuple[slice, ...] | None:
    """Find the smallest box around the places that differ; None where there are none."""
    box = []
    for d in range(changed.dim()):
        others = [e for e in range(changed.dim()) if e != d]
        places = (changed.any(others) if others else changed).nonzero().flatten()
        if not len(places):
            return None
        box.append(slice(int(places[0]), int(places[-1]) + 1))
        changed = changed.narrow(d, box[-1].start, box[-1].stop - box[-1].start)
    return tuple(box) if bool(changed.any()) else None


def _scale(tensor: Tensor, part: Tensor, shadow: Tensor) -> Tensor:
    """Return the largest absolute value of a tensor that is not out of all proportion to what differs in a part."""
    differs = part != shadow
    differing = torch.maximum(_largest(part[differs]), _largest(shadow[differs]))
    return torch.minimum(_largest(tensor), _OUTLIER * differing)


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest finite absolute value of a tensor."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.numel():
        return torch.zeros((), device=tensor.device)
    if not tensor.is_floating_point():
        return torch.ones((), device=tensor.device)
    low, high = (edge.abs() for edge in tensor.aminmax())
    largest = torch.maximum(low, high).float()
    return largest if bool(largest.isfinite()) else tensor.float().abs().nan_to_num(0.0, 0.0, 0.0).amax()
