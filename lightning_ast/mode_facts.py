"""The modes: their names, and the facts that decide what each costs and what it can be combined with.

Nothing here needs torch, so that the command line and the report can name the modes at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["MODES", "MODE_FACTS", "Mode", "ModeFacts", "PruneSteps", "cost_share"]

Mode = Literal["mask", "subset", "partial", "prune"]
MODES: tuple[Mode, ...] = get_args(Mode)

PruneSteps = Literal["keep", "follow", "replan"]
"""How the optimizer steps of a pruned epoch relate to those of a dense one: as many; fewer, each standing for several
in the schedules; or fewer, with schedules that are planned for them."""


@dataclass(frozen=True, kw_only=True)
class ModeFacts:
    """What is true of a mode in every run.

    Attributes:
        forwards_all: Whether every offered sample has a forward, to train or to be scored.
        forwards_selected: Whether the selected samples have a forward of their own.
        spares_backward: Whether the samples that are not selected have no backward.
        plans_epochs: Whether what is loaded is selected ahead of an epoch: stages are whole epochs, all processes draw
            alike, and the weights of the draws are not used unless they are asked for.
    """

    forwards_all: bool = True
    forwards_selected: bool = False
    spares_backward: bool = True
    plans_epochs: bool = False

    @property
    def keeps_full_loss(self) -> bool:
        """Tell whether the loss of a step is that of the whole batch, though its gradient is the selection's."""
        return self.forwards_all and not self.forwards_selected

    def passes(self, offered: float, selected: float, *, dense_share: float = 0.0) -> tuple[float, float]:
        """Count the forwards and the backwards of one sample that a batch takes.

        ``dense_share`` is the share of the backward that runs over every sample for want of a rule, in [0, 1].
        """
        forwards = offered * self.forwards_all + selected * self.forwards_selected
        spared = offered - selected if self.spares_backward else 0
        return forwards, offered - (spared * (1 - dense_share) if dense_share else spared)


MODE_FACTS: dict[Mode, ModeFacts] = {
    "mask": ModeFacts(spares_backward=False),
    "subset": ModeFacts(forwards_selected=True),
    "partial": ModeFacts(),
    "prune": ModeFacts(forwards_all=False, forwards_selected=True, plans_epochs=True),
}


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
    forwards, backwards = MODE_FACTS[mode].passes(1.0, rate, dense_share=dense_share)
    return forwards * forward + backwards * (1 - forward)
