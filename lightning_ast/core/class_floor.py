"""Step 5, beside the gate: keep a share of each class, so that no class is passed over."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ast.core.gate import Selection

__all__ = ["with_class_floor"]

_ROUNDING = 1e-9


def with_class_floor(
    selection: Selection,
    significance: Tensor,
    classes: Tensor,
    floor: float,
    *,
    eligible: Tensor | None = None,
    fixed: Tensor | None = None,
) -> Selection:
    """Add the most significant samples of each class of which too few were selected.

    Args:
        selection: The samples that the gate selected among n.
        significance: ``(n,)``, on the CPU like all that follows.
        classes: ``(n,)`` class indices; a negative one is not known and has no floor.
        floor: The share of each class that is kept, rounded up to whole samples; in [0, 1].
        eligible: ``(n,)`` bool, the samples that may be selected at all; None for all.
        fixed: ``(n,)`` bool, the selected samples that must stay. Where it is given, the number of selected samples
            stays as well: for each that is added, the least significant one that its class can spare is left out. None
            leaves none out.

    Example:
        >>> most = Selection(torch.tensor([0, 1]))
        >>> s = torch.tensor([0.9, 0.8, 0.3, 0.2])
        >>> with_class_floor(most, s, torch.tensor([0, 0, 1, 1]), 0.5).indices
        tensor([0, 1, 2])
    """
    kept = torch.zeros(significance.numel(), dtype=torch.bool).index_fill_(0, selection.indices, True)
    known = classes >= 0
    kinds = int(classes.max()) + 1 if classes.numel() else 0
    if kinds <= 0:
        return selection
    sizes = classes[known].bincount(minlength=kinds)
    held = classes[known & kept].bincount(minlength=kinds)
    needed = (floor * sizes.double() - _ROUNDING).ceil().long().clamp_min(0)
    open_to_choice = ~kept & known if eligible is None else ~kept & known & eligible
    added = _best_of_each(open_to_choice, significance, classes, (needed - held).clamp_min(0))
    if added.numel() == 0:
        return selection
    removed = added[:0]
    if fixed is not None:
        spare = _best_of_each(kept & known & ~fixed, -significance, classes, (held - needed).clamp_min(0))
        spare = torch.cat([spare, (kept & ~known & ~fixed).nonzero().squeeze(1)])
        added = added[significance[added].argsort(descending=True)][: spare.numel()]
        removed = spare[significance[spare].argsort()][: added.numel()]
    return _exchanged(selection, added, removed, significance.numel())


def _best_of_each(among: Tensor, values: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Return the positions of the largest values of each class, so many as ``counts`` has for it."""
    positions = among.nonzero().squeeze(1)
    positions = positions[values[positions].argsort(descending=True, stable=True)]
    own, order = classes[positions].sort(stable=True)
    first = torch.searchsorted(own, torch.arange(counts.numel(), dtype=own.dtype))
    rank = torch.arange(own.numel()) - first[own.long()]
    return positions[order[rank < counts[own.long()]]]


def _exchanged(selection: Selection, added: Tensor, removed: Tensor, size: int) -> Selection:
    """Add samples, which are kept for certain and so have weight 1, and leave others out."""
    stays = ~torch.zeros(size, dtype=torch.bool).index_fill_(0, removed, True)[selection.indices]
    indices, order = torch.cat([selection.indices[stays], added]).sort()
    if selection.weights is None:
        return Selection(indices)
    weights = torch.cat([selection.weights[stays], selection.weights.new_ones(added.numel())])
    return Selection(indices, weights[order])
