"""Step 5 of a batch: how a selection is executed, and what loss goes into the backward.

``mask`` runs one forward and leaves the losses of the other samples out; ``partial`` does the same and makes the
backward compute over the selected rows only; ``subset`` scores without gradient, then runs forward and backward on the
selected samples. All reduce the same way:

====================  ==========================================  ================================
weighting             loss                                        what it estimates
====================  ==========================================  ================================
``none`` (p^0)        ``sum_S(l) / sum_S(c)``                     mean over the selected samples
``sqrt`` (p^-1/2)     ``sum_S(w * l) / sum_S(w * c)``             between the two
``unbiased`` (p^-1)   ``sum_S(w * l) / sum_all(c)``               the full batch's mean, unbiased
====================  ==========================================  ================================

with l the summed loss elements of a sample, c its share of the user's own denominator (class weights,
``ignore_index``). Where the user sums, it is that mean times the whole batch's count: an estimate of the full sum.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
from torch import Tensor

from lightning_ast.core.gate import GateName, Selection, Weighting
from lightning_ast.core.partial import BatchNormBackward, select_rows

__all__ = [
    "Mode",
    "cost_share",
    "denominator",
    "mask_rows",
    "partial_mean",
    "report_full_loss",
    "resolve_weighting",
    "selected_loss",
    "selected_mean",
]

Mode = Literal["mask", "subset", "partial", "prune"]


def resolve_weighting(weighting: Weighting | None, *, mode: Mode, gate: GateName) -> Weighting:
    """What a weighting means.

    Args:
        weighting: as the user gave it; None is ``"none"`` in ``prune`` and ``"sqrt"`` in the other modes.
        mode: how the selection is executed.
        gate: the hard gates have no keep-probabilities: always ``"none"``.

    Example:
        >>> resolve_weighting(None, mode="partial", gate="soft"), resolve_weighting(None, mode="prune", gate="soft")
        ('sqrt', 'none')
    """
    if gate != "soft":
        return "none"
    return weighting or ("none" if mode == "prune" else "sqrt")


def denominator(
    counts: Tensor, selection: Selection, weighting: Weighting, *, total_count: Tensor, mean: bool = True
) -> Tensor:
    """What the selected, weighted loss sum is divided by.

    Args:
        counts: ``(k,)`` each selected sample's share of the user's denominator.
        selection: indices and weights of the k samples.
        weighting: see the table above.
        total_count: scalar, the counts of the whole batch summed.
        mean: whether the user's loss averages; for a sum the denominator is divided by ``total_count``.

    Returns:
        Positive scalar without gradient.
    """
    if weighting == "unbiased":
        divisor = total_count
    else:
        weighted = counts if selection.weights is None else counts * selection.weights.to(counts.dtype)
        divisor = weighted.sum().clamp_min(torch.finfo(counts.dtype).tiny)
    return divisor if mean else divisor / total_count


def selected_loss(sums: Tensor, selection: Selection, divisor: Tensor) -> Tensor:
    """The loss whose gradient is the selection's: ``sum(weights * sums) / divisor``.

    Args:
        sums: ``(k,)`` summed loss elements of the selected samples, with their graph.
        selection: indices and weights of the k samples.
        divisor: from :func:`denominator`.

    Returns:
        Scalar with gradient.

    Example:
        >>> losses = torch.tensor([1.0, 2.0, 3.0])
        >>> kept = Selection(torch.tensor([0, 2]))
        >>> counts = torch.ones(2)
        >>> selected_loss(losses[kept.indices], kept, denominator(counts, kept, "none", total_count=torch.tensor(3.0)))
        tensor(2.)
    """
    weighted = sums if selection.weights is None else sums * selection.weights.to(sums.dtype)
    return weighted.sum() / divisor


def selected_mean(losses: Tensor, selection: Selection, *, batch_size: int, weighting: Weighting = "sqrt") -> Tensor:
    """:func:`selected_loss` for a plain training loop: the weighted mean of the selected samples' losses.

    Args:
        losses: ``(k,)`` of the selected samples, with their graph.
        selection: indices and weights of the k samples.
        batch_size: samples in the whole batch.
        weighting: what the selector uses.

    Returns:
        Scalar with gradient.

    Example:
        >>> selected_mean(torch.tensor([1.0, 3.0]), Selection(torch.tensor([0, 2])), batch_size=4)
        tensor(2.)
    """
    total = losses.new_tensor(float(batch_size))
    return selected_loss(
        losses, selection, denominator(torch.ones_like(losses), selection, weighting, total_count=total)
    )


def partial_mean(
    losses: Tensor,
    selection: Selection,
    *,
    weighting: Weighting = "sqrt",
    batchnorm: BatchNormBackward = "selected",
    dense_ops: Counter[str] | None = None,
) -> Tensor:
    """:func:`selected_mean` of the whole batch's losses, with a backward over the selected rows only.

    Args:
        losses: ``(B,)`` of the whole batch, with their graph.
        selection: indices and weights of the k samples.
        weighting: what the selector uses.
        batchnorm: see :func:`lightning_ast.core.select_rows`.
        dense_ops: see :func:`lightning_ast.core.select_rows`.

    Returns:
        Scalar with gradient.

    Example:
        >>> partial_mean(torch.tensor([1.0, 5.0, 3.0]), Selection(torch.tensor([0, 2])))
        tensor(2.)
    """
    ones = torch.ones_like(selection.indices, dtype=losses.dtype)
    total = losses.new_tensor(float(losses.numel()))
    divisor = denominator(ones, selection, weighting, total_count=total)
    loss = select_rows(losses, selection.indices, selection.weights, batchnorm=batchnorm, dense_ops=dense_ops)
    return loss / divisor


def mask_rows(losses: Tensor, indices: Tensor, factors: Tensor | None = None) -> Tensor:
    """Per-sample losses, zero but for the selected ones, with an ordinary backward over the whole batch.

    Args:
        losses: ``(B,)`` with its graph.
        indices: ``(k,)`` positions of the selected samples.
        factors: ``(k,)`` multiplies the selected losses, or None for 1.

    Returns:
        ``(B,)``; :func:`lightning_ast.core.partial.keep_rows` gives the same values.
    """
    picked = losses[indices] if factors is None else losses[indices] * factors.to(losses.dtype)
    return torch.zeros_like(losses).index_add(0, indices, picked)


def report_full_loss(selected: Tensor, full: Tensor) -> Tensor:
    """The value of ``full`` with the gradient of ``selected``, so that curves stay comparable with a dense run.

    Args:
        selected: any shape, with gradient.
        full: same shape; its gradient is not used.
    """
    return selected + (full - selected).detach()


def cost_share(mode: Mode, rate: float) -> float:
    """Compute of a sparse step as a share of a dense one, counting forward 1 and backward 2.

    Args:
        mode: how the selection is executed.
        rate: activation rate in [0, 1].

    Returns:
        ``mask`` 1, ``subset`` (1 + 3r) / 3, ``partial`` (1 + 2r) / 3, ``prune`` r.

    Example:
        >>> round(cost_share("subset", 0.4), 3)
        0.733
    """
    return {"mask": 1.0, "subset": (1 + 3 * rate) / 3, "partial": (1 + 2 * rate) / 3, "prune": rate}[mode]
