"""Where the samples of a batch lie in a tensor, and the proof of it from what changes with one sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ast.core.partial.rows import Place, place_of

__all__ = ["Layout", "layouts_by_size", "prove_layout", "row_norms", "spread"]

_EXACT = 1e-3
"""Change of all other samples, as a share of the changed sample's, up to which they count as unchanged."""
_MIXED = 0.2
"""Mean change of another sample, as a share of the changed sample's, up to which its rows can be told."""
_PARTNERS = 0.5
"""Share of the other samples' rows that may change as well, however much, as those mixed with the sample do."""


@dataclass(frozen=True)
class Layout:
    """Where the samples lie in a tensor, whatever its sizes in a particular batch.

    Attributes:
        ndim: Number of dimensions of the tensor.
        dim: The dimension that holds the samples; its size is ``pre * B * post``.
        pre: Groups outside the samples: T in ``(T * B, C)``. It may differ in other batches where ``post`` is 1.
        post: Rows of one sample: T in ``(B * T, C)``. It may differ in other batches where ``pre`` is 1.
        exact: Whether a sample changes its own rows alone. False: other rows follow it to a lesser degree.
    """

    ndim: int
    dim: int
    pre: int
    post: int
    exact: bool = True

    def place(self, shape: tuple[int, ...], batch_size: int) -> Place | None:
        """Find the samples in a tensor of another batch.

        Args:
            shape: Shape of the tensor.
            batch_size: Samples B of the batch.

        Returns:
            Their place, or None where the shape does not fit.
        """
        if len(shape) != self.ndim:
            return None
        groups, rest = divmod(shape[self.dim], batch_size)
        if rest or groups == 0:
            return None
        if groups == self.pre * self.post:
            return place_of(shape, self.dim, self.pre, self.post)
        if self.pre > 1 and self.post == 1:
            return place_of(shape, self.dim, groups, 1)
        if self.post > 1 and self.pre == 1:
            return place_of(shape, self.dim, 1, groups)
        return None


def layouts_by_size(shape: tuple[int, ...], batch_size: int) -> Iterator[Layout]:
    """List every layout that the sizes of a tensor allow.

    Args:
        shape: Shape of the tensor.
        batch_size: Samples B of the batch.

    Example:
        >>> [(layout.dim, layout.pre, layout.post) for layout in layouts_by_size((8, 3), 4)]
        [(0, 1, 2), (0, 2, 1)]
    """
    for dim, size in enumerate(shape):
        groups, rest = divmod(size, batch_size)
        if rest == 0 and groups > 0:
            for pre in range(1, groups + 1):
                if groups % pre == 0:
                    yield Layout(len(shape), dim, pre, groups // pre)


def prove_layout(
    shape: tuple[int, ...], profiles: tuple[Tensor, ...], *, batch_size: int, sample: int
) -> Layout | None:
    """Find the one layout that explains which rows changed with one sample.

    Args:
        shape: Shape of the tensor.
        profiles: For each dimension ``(shape[dim],)``, how much its entries change with the sample.
        batch_size: Samples B of the batch.
        sample: Position of the changed sample.

    Returns:
        The layout, or None where none or several explain the change.

    Example:
        >>> changed = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])  # rows 3 and 7 of (2 * 4, C)
        >>> layout = prove_layout((8,), (changed,), batch_size=4, sample=3)
        >>> layout.pre, layout.post
        (2, 1)
    """
    found: list[tuple[float, Layout]] = []
    for layout in layouts_by_size(shape, batch_size):
        profile = profiles[layout.dim].double()
        position = torch.arange(profile.numel())
        own = (position // layout.post) % batch_size == sample
        inside, outside = profile[own], profile[~own]
        change = float(inside.sum())
        if change == 0:
            continue
        exact = float(outside.sum()) <= _EXACT * change
        mixed = float(outside.mean()) <= _MIXED * float(inside.mean())
        if exact or mixed or float((outside > 0).double().mean()) <= _PARTNERS:
            coverage = float((inside > 0).double().mean())
            found.append((coverage + exact, Layout(layout.ndim, layout.dim, layout.pre, layout.post, exact)))
    found.sort(key=lambda entry: entry[0], reverse=True)
    if not found or (len(found) > 1 and found[0][0] == found[1][0]):
        return None
    return found[0][1]


def row_norms(gradient: Tensor, place: Place) -> Tensor:
    """Take the norm of each sample's rows.

    Args:
        gradient: The tensor, of ``place.shape``.
        place: Where the samples lie in it.

    Returns:
        ``(B,)`` float32, or float64 for a gradient of that type.
    """
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    if place.dim == 0 and place.pre == 1:
        samples = gradient.reshape(place.size // place.post, -1)
        return _norms(samples, [1], dtype)
    shape = gradient.shape
    size = place.size // (place.pre * place.post)
    grouped = gradient.reshape(*shape[: place.dim], place.pre, size, place.post, *shape[place.dim + 1 :])
    others = [dim for dim in range(grouped.dim()) if dim != place.dim + 1]
    return _norms(grouped, others, dtype)


def _norms(values: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=dims, dtype=dtype)
    return norms


def spread(values: Tensor, place: Place) -> Tensor:
    """Give each row of a tensor the value of its sample.

    Args:
        values: ``(B,)``.
        place: Where the samples lie in the tensor.

    Returns:
        A tensor that broadcasts against one of ``place.shape``.
    """
    if place.post > 1:
        values = values.repeat_interleave(place.post)
    if place.pre > 1:
        values = values.repeat(place.pre)
    return values.view(-1, *[1] * (-place.from_end - 1))
