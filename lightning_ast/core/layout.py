"""Where the samples of a batch lie in a tensor, and the proof of it from what changes with one sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ast.core.partial.rows import Place, place_of

__all__ = ["Layout", "assigned_layout", "common_ratio", "layouts_by_size", "prove_layout", "row_norms", "spread"]

_EXACT = 1e-3
"""Change of all other samples, as a share of the changed sample's, up to which they count as unchanged."""
_AGREED = 1e-2
"""Relative difference of ratios up to which they count as one and the same."""
_FEW = 4
"""Ratios that may agree by chance."""
_MIXED = 0.2
"""Mean change of another sample, as a share of the changed sample's, up to which its rows can be told."""


@dataclass(frozen=True)
class Layout:
    """Where the samples lie in a tensor, whatever its sizes in a particular batch.

    Attributes:
        ndim: Number of dimensions of the tensor.
        dim: The dimension that holds the samples; its size is ``pre * B * post``.
        pre: Groups outside the samples: T in ``(T * B, C)``. It may differ in other batches where ``post`` is 1.
        post: Rows of one sample: T in ``(B * T, C)``. It may differ in other batches where ``pre`` is 1.
        exact: Whether a sample changes its own rows alone. False: other rows follow it to a lesser degree.
        assigned: For graphs, which of the batch's assignments tells the sample of each row; None: the sizes do.
    """

    ndim: int
    dim: int
    pre: int
    post: int
    exact: bool = True
    assigned: int | None = None

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
        if self.assigned is not None:
            return place_of(shape, self.dim)
        groups, rest = divmod(shape[self.dim], batch_size)
        if rest or groups == 0:
            return None
        pre, post = self.pre, self.post
        if groups != pre * post:
            if (pre > 1) == (post > 1):
                return None
            pre, post = (groups, 1) if pre > 1 else (1, groups)
        return place_of(shape, self.dim, pre, post)


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
        if exact or float(outside.mean()) <= _MIXED * float(inside.mean()):
            coverage = float((inside > 0).double().mean())
            found.append((coverage + exact, Layout(layout.ndim, layout.dim, layout.pre, layout.post, exact)))
    found.sort(key=lambda entry: entry[0], reverse=True)
    if not found or (len(found) > 1 and found[0][0] == found[1][0]):
        return None
    return found[0][1]


def assigned_layout(
    shape: tuple[int, ...], assignments: tuple[Tensor, ...], changed: Tensor | None = None, sample: int = 0
) -> Layout | None:
    """Find the assignment that tells the sample of each row, as nodes and edges have one.

    Args:
        shape: Shape of the tensor; its rows lie along the first dimension.
        assignments: For each kind of rows ``(N,)``, the sample of each row.
        changed: ``(N,)`` how much each row changes with a sample, where that is known.
        sample: Position of that sample.

    Example:
        >>> assigned_layout((3, 8), (torch.tensor([0, 1, 1]),), torch.tensor([0.0, 2.0, 1.0]), sample=1).assigned
        0
    """
    for position, assignment in enumerate(assignments):
        if not shape or len(assignment) != shape[0]:
            continue
        if changed is None or not bool(changed[assignment.to(changed.device) != sample].any()):
            return Layout(len(shape), 0, 1, 1, assigned=position)
    return None


def row_norms(gradient: Tensor, place: Place, assignment: Tensor | None = None, batch_size: int = 0) -> Tensor:
    """Take the norm of each sample's rows.

    Args:
        gradient: The tensor, of ``place.shape``.
        place: Where the samples lie in it.
        assignment: The sample of each row, where samples have unequal numbers of rows.
        batch_size: Samples B; needed for an assignment alone.

    Returns:
        ``(B,)`` float32, or float64 for a gradient of that type.
    """
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    if assignment is not None:
        squares: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=dtype).square()
        return squares.new_zeros(batch_size).index_add(0, assignment, squares).sqrt()
    if place.dim == 0 and place.pre == 1:
        samples = gradient.reshape(place.size // place.post, -1)
        return torch.linalg.vector_norm(samples, dim=1, dtype=dtype)
    shape = gradient.shape
    size = place.size // (place.pre * place.post)
    grouped = gradient.reshape(*shape[: place.dim], place.pre, size, place.post, *shape[place.dim + 1 :])
    others = [dim for dim in range(grouped.dim()) if dim != place.dim + 1]
    return torch.linalg.vector_norm(grouped, dim=others, dtype=dtype)


def spread(values: Tensor, place: Place, assignment: Tensor | None = None) -> Tensor:
    """Give each row of a tensor the value of its sample.

    Args:
        values: ``(B,)``.
        place: Where the samples lie in the tensor.
        assignment: The sample of each row, where samples have unequal numbers of rows.

    Returns:
        A tensor that broadcasts against one of ``place.shape``.
    """
    if assignment is not None:
        values = values[assignment]
    if place.post > 1:
        values = values.repeat_interleave(place.post)
    if place.pre > 1:
        values = values.repeat(place.pre)
    return values.view(-1, *[1] * (-place.from_end - 1))


def common_ratio(expected: Tensor, got: Tensor) -> Tensor:
    """Find the one number that all samples' norms are to be multiplied by; 1 where the samples do not agree on one.

    The rows of a mean over B samples, and of one over the tokens of the batch, are larger in a part of the batch; those
    of a sum are not.

    Args:
        expected: ``(k,)`` norms of the samples' rows, times the number of samples they were computed with.
        got: ``(k,)`` the same from another forward.

    Example:
        >>> whole, part = torch.tensor([4.0, 2.0, 8.0, 6.0]), torch.tensor([2.0, 1.0, 4.0, 3.0])
        >>> common_ratio(whole, part), common_ratio(whole, torch.ones(4))
        (tensor(2.), tensor(1.))
    """
    one = torch.ones((), dtype=got.dtype, device=got.device)
    if got.numel() < _FEW:
        return one
    expected = expected.to(got)
    ratio = expected / got
    known = ratio.isfinite() & (ratio > 0)
    low = ratio.where(known, one * torch.inf).amin()
    high = ratio.where(known, -one * torch.inf).amax()
    agreed = (known.sum() >= _FEW) & (high <= low * (1 + _AGREED))
    middle = (low + high) / 2
    return middle.where(agreed & ((middle - 1).abs() > _EXACT), one)
