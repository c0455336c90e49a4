"""Step 6 of a batch: how its selection is executed, and what that costs.

Rows of the gradient are multiplied by the weights w of the selected samples, and by B / d:

====================  =================  ================================
weighting             d                  what the gradient estimates
====================  =================  ================================
``none`` (p^0)        number selected    mean over the selected samples
``sqrt`` (p^-1/2)     ``sum(w)``         between the two
``unbiased`` (p^-1)   B                  the full batch's mean, unbiased
====================  =================  ================================
"""

from __future__ import annotations

from typing import Literal

from lightning_ast.core.gate import GateName, Weighting

__all__ = ["Mode", "cost_share", "resolve_weighting"]

Mode = Literal["mask", "subset", "partial", "prune"]


def resolve_weighting(weighting: Weighting | None, *, mode: Mode, gate: GateName) -> Weighting:
    """Return the weighting that is used.

    Args:
        weighting: The user's choice; None is ``"none"`` in ``prune`` and ``"sqrt"`` in the other modes.
        mode: How the selection is executed.
        gate: The hard gates have no keep-probabilities: with them it is always ``"none"``.

    Example:
        >>> resolve_weighting(None, mode="partial", gate="soft"), resolve_weighting(None, mode="prune", gate="soft")
        ('sqrt', 'none')
    """
    if gate != "soft":
        return "none"
    return weighting or ("none" if mode == "prune" else "sqrt")


def cost_share(mode: Mode, rate: float, *, forward: float = 1 / 3, dense_share: float = 0.0) -> float:
    """Return the compute of a sparse step as a share of that of a dense one.

    Args:
        mode: How the selection is executed.
        rate: The activation rate, in [0, 1].
        forward: The forward's share of a dense step; a third where all parameters are trained, more where layers are
            frozen.
        dense_share: The share of the backward that ``partial`` runs over every sample for want of a rule, in [0, 1].

    Returns:
        By default ``mask`` 1, ``subset`` (1 + 3r) / 3, ``partial`` (1 + 2r) / 3, ``prune`` r.

    Example:
        >>> round(cost_share("subset", 0.4), 3), round(cost_share("subset", 0.4, forward=0.9), 3)
        (0.733, 1.3)
    """
    partial = forward + (1 - forward) * (rate + (1 - rate) * dense_share)
    return {"mask": 1.0, "subset": forward + rate, "partial": partial, "prune": rate}[mode]
