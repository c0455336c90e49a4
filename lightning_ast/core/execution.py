"""How a selection is executed, and what that costs.

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
