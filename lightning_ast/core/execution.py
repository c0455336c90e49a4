"""Step 6 of a batch: how its selection is executed.

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

from lightning_ast.core.gate import GateName, Weighting
from lightning_ast.mode_facts import MODE_FACTS, Mode, cost_share

__all__ = ["Mode", "cost_share", "resolve_weighting"]


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
    return weighting or ("none" if MODE_FACTS[mode].plans_epochs else "sqrt")
