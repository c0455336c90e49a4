"""Step 3, the rows: where the samples of a batch lie in a tensor, proved by what changes with one sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ast.core.batch.graphs import Assignments
from lightning_ast.core.dependence.records import Dependence
from lightning_ast.core.partial.rows import Place, UnequalPlace, place_of

__all__ = ["Layout", "layouts_by_assignment", "layouts_by_size", "prove_layout", "row_norms", "spread"]

_EXACT = 1e-3
"""Change of all other samples, as a share of the changed sample's, up to which they count as unchanged."""
_MIXED = 0.2
"""Mean change of another sample, as a share of the changed sample's, up to which rows can be told apart.

BatchNorm in training mixes the samples, but each one's own rows still change most.
"""
_PARTNERS = 0.5
"""Share of the other samples' rows that may change as well, however much, as those mixed with the sample do."""


@dataclass(frozen=True)
class Layout:
    """Where the samples lie in a tensor, whatever its sizes in a particular batch.

    Attributes:
        ndim: The number of dimensions of the tensor.
        dim: The dimension that holds the samples; its size is ``pre * B * post``.
        pre: The groups outside the samples: T in ``(T * B, C)``. It may differ in other batches where ``post`` is 1.
        post: The rows of one sample: T in ``(B * T, C)``. It may differ in other batches where ``pre`` is 1.
        exact: Whether a sample changes its own rows alone. If not, other rows follow it to a lesser degree.
        assigned: The position of the assignment of graphs that tells the sample of each row; None where sizes do.
    """

    ndim: int
    dim: int
    pre: int
    post: int
    exact: bool = True
    assigned: int | None = None

    def place(self, shape: tuple[int, ...], batch_size: int, assignments: Assignments = ()) -> Place | None:
        """Find the samples in a tensor of another batch; return None where its shape does not fit."""
        if len(shape) != self.ndim:
            return None
        if self.assigned is not None:
            fitting = [rows for rows in assignments[self.assigned :][:1] if len(rows) == shape[0]]
            return UnequalPlace(shape, 0, 1, 1, -len(shape), shape[0], fitting[0], batch_size) if fitting else None
        # Another length of the sequences changes `pre` or `post`, so that only the one that is not 1 may differ.
        groups, rest = divmod(shape[self.dim], batch_size)
        if rest or groups == 0:  # not a multiple of the samples, or fewer rows than samples
            return None
        if groups == self.pre * self.post:
            return place_of(shape, self.dim, self.pre, self.post)
        if (self.pre > 1) == (self.post > 1):  # which of the two has grown, or whether the rows have, is unknown
            return None
        return place_of(shape, self.dim, groups if self.pre > 1 else 1, groups if self.post > 1 else 1)


def layouts_by_size(shape: tuple[int, ...], batch_size: int) -> Iterator[Layout]:
    """List every layout that the sizes of a tensor allow in a batch of ``batch_size`` samples."""
    for dim, size in enumerate(shape):
        groups, rest = divmod(size, batch_size)
        if rest == 0 and groups > 0:
            for pre in range(1, groups + 1):
                if groups % pre == 0:
                    yield Layout(len(shape), dim, pre, groups // pre)


def layouts_by_assignment(shape: tuple[int, ...], assignments: Assignments) -> Iterator[Layout]:
    """List the layouts that the numbers of nodes and edges of a batch of graphs allow along the first dimension."""
    # Nodes and edges may be equally many; two equal assignments are one layout all the same.
    fitting = [k for k, assignment in enumerate(assignments) if shape and len(assignment) == shape[0]]
    for k in fitting:
        if k == fitting[0] or not torch.equal(assignments[k], assignments[fitting[0]]):
            yield Layout(len(shape), 0, 1, 1, assigned=k)


def prove_layout(
    dependence: Dependence, batch_size: int, sample: int | tuple[int, ...], assignments: Assignments = ()
) -> Layout | None:
    """Find the layout that alone explains which rows changed with ``sample``; None where none or several do."""
    found: list[tuple[float, Layout]] = []
    for layout, own in _candidates(dependence.shape, batch_size, torch.tensor(sample), assignments):
        # Summed over the other dimensions a change stays a change, so that one profile a dimension is enough.
        profile = dependence.profiles[layout.dim].double()
        inside = profile[own]
        outside = profile[~own]
        change = float(inside.sum())
        if change == 0:  # these rows do not depend on the sample at all
            continue
        exact = float(outside.sum()) <= _EXACT * change
        mixed = float(outside.mean()) <= _MIXED * float(inside.mean())
        # Mixup and the like change many rows of few other samples; a wrong layout changes rows of nearly all.
        if exact or mixed or float((outside > 0).double().mean()) <= _PARTNERS:
            coverage = float((inside > 0).double().mean())  # a row that is not the sample's would stand still
            found.append((coverage + exact, replace(layout, exact=exact)))
    # Exact layouts win over mixed ones, and those whose rows all changed over those that only some explain.
    found.sort(key=lambda entry: entry[0], reverse=True)
    if not found or (len(found) > 1 and found[0][0] == found[1][0]):
        return None
    return found[0][1]


def _candidates(
    shape: tuple[int, ...], batch_size: int, samples: Tensor, assignments: Assignments
) -> Iterator[tuple[Layout, Tensor]]:
    """List the layouts, each with the rows that it gives the samples; what assignments explain comes once."""
    assigned: list[Tensor] = []
    for layout in layouts_by_assignment(shape, assignments):
        assigned.append(torch.isin(assignments[layout.assigned or 0].cpu(), samples))
        yield layout, assigned[-1]
    for layout in layouts_by_size(shape, batch_size):
        # The dimension is (pre, B, post), flattened.
        own = torch.isin((torch.arange(shape[layout.dim]) // layout.post) % batch_size, samples)
        if layout.dim or not any(torch.equal(own, other) for other in assigned):
            yield layout, own


def row_norms(gradient: Tensor, place: Place) -> Tensor:
    """Take the norm ``(B,)`` of each sample's rows, in float32, or float64 for a gradient of that type."""
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())  # of the same norm
    # In 16 bits the squares of a scaled gradient would overflow.
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    if isinstance(place, UnequalPlace):
        squares: Tensor = torch.linalg.vector_norm(gradient.reshape(place.size, -1), dim=1, dtype=dtype).square()
        return squares.new_zeros(place.count).index_add(0, place.assignment, squares).sqrt()
    dims = [1]
    if place.dim == 0 and place.pre == 1:  # the usual case, in one view
        grouped = gradient.reshape(place.size // place.post, -1)
    else:  # apart from the samples' own, all dimensions are summed over, the groups outside and inside them too
        shape = gradient.shape
        size = place.size // (place.pre * place.post)
        grouped = gradient.reshape(*shape[: place.dim], place.pre, size, place.post, *shape[place.dim + 1 :])
        dims = [dim for dim in range(grouped.dim()) if dim != place.dim + 1]
    norms: Tensor = torch.linalg.vector_norm(grouped, dim=dims, dtype=dtype)
    return norms


def spread(values: Tensor, place: Place) -> Tensor:
    """Give each row of a tensor the value ``(B,)`` of its sample; the result broadcasts against ``place.shape``."""
    if isinstance(place, UnequalPlace):
        values = values[place.assignment]
    if place.post > 1:  # both copies are left out where there is one row a sample: it is called in every backward
        values = values.repeat_interleave(place.post)
    if place.pre > 1:
        values = values.repeat(place.pre)
    # Behind the samples' dimension all are of size 1; those before it are added by broadcasting.
    return values.view(-1, *[1] * (-place.from_end - 1))
