"""What the scoring pass of ``subset`` finds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_ast.core.losses.capture import LossRecord

__all__ = ["Scored"]


@dataclass(frozen=True)
class Scored:
    """What a scoring pass found.

    Attributes:
        norms: ``(B,)`` norm of each sample's rows of the gradient of the loss, times B.
        labels: ``(B,)`` class indices, or None.
        record: The losses by their values, where the score needs them.
    """

    norms: Tensor
    labels: Tensor | None
    record: LossRecord | None
