"""What is to be done with the current batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.gate import Selection

__all__ = ["BatchPlan"]


@dataclass
class BatchPlan:
    """What is to be done with the current batch; it lives from its start to its end.

    Attributes:
        batch_size: Samples of the batch.
        sparse: Whether a selection is trained on; False only watches.
        partial: Whether the backward computes over the selected rows alone.
        stands_for: In ``prune``, samples of a dense epoch that the batch stands for; None elsewhere: its own.
        observe: Told the significance ``(B,)`` of the batch as it is trained on, or None.
        indices: ``(B,)`` dataset indices of its samples, where they are known.
        selection: None until the gradient was seen (in ``subset``: until the batch was scored); then kept, so that
            every loss, closure and backward of the batch has one selection.
        sub_batch: The selected samples, for ``subset``.
        scored_norms: ``(k,)`` norms of the selected samples' gradients in the scoring pass of ``subset``, or None.
        significance: ``(B,)``, where it was computed.
        labels: ``(B,)`` class indices, where they are known and the significance was computed.
        bad: ``(B,)`` bool, samples that are not finite; None where the host knows of none.
        leave_out: Whether the selection is every sample but the bad ones, without weights, in a dense step.
        traced: Whether a sample is followed through the step's own forward.
        void: Whether no sample can be trained on; the selection stands for none, and the gradient is zero.
    """

    batch_size: int
    sparse: bool
    partial: bool = False
    stands_for: int | None = None
    observe: Callable[[Tensor], None] | None = None
    indices: Tensor | None = None
    selection: Selection | None = None
    sub_batch: Any = None
    scored_norms: Tensor | None = None
    significance: Tensor | None = None
    labels: Tensor | None = None
    bad: Tensor | None = None
    leave_out: bool = False
    traced: bool = False
    void: bool = False

    @property
    def offered(self) -> int:
        """Samples that a dense run would have trained on here."""
        return self.batch_size if self.stands_for is None else self.stands_for

    @property
    def selected(self) -> int:
        """Samples that are trained on."""
        if self.void:
            return 0
        return self.batch_size if self.selection is None else self.selection.indices.numel()

    @property
    def forwarded(self) -> int:
        """Samples that the step's own forward sees."""
        return self.batch_size if self.sub_batch is None or self.selection is None else self.selection.indices.numel()

    @property
    def may_spare_rows(self) -> bool:
        """Whether the backward may leave samples of the forward out; the selection need not be made yet."""
        return self.partial and self.sparse

    @property
    def spares_rows(self) -> bool:
        """Whether the backward left samples of the forward out."""
        return self.may_spare_rows and self.selected < self.batch_size

    @property
    def known_bad(self) -> bool:
        """Whether the host knows, without waiting for a device, that samples are not finite."""
        return self.bad is not None and self.bad.device.type == "cpu"

    @property
    def is_gated(self) -> bool:
        """Whether something is to be done where the gradient enters the network."""
        return self.sparse or self.leave_out or self.observe is not None

    def quarantine(self, bad: Tensor) -> None:
        """Add samples ``(B,)`` that are not finite to those that are known."""
        self.bad = bad if self.bad is None else bad | self.bad.to(bad.device)

    def note(self, significance: Tensor, labels: Tensor | None) -> None:
        """Keep the significance ``(B,)`` and the classes of the samples, for those who watch."""
        self.significance = significance.detach()
        self.labels = labels

    def everything(self, device: torch.device) -> Selection:
        """Select every sample, without weights."""
        return Selection(torch.arange(self.batch_size, device=device))

    def select(self, selection: Selection) -> None:
        """Train on this selection; where it is empty, on nothing."""
        if selection.indices.numel() == 0:
            self.void = True
            selection = Selection(selection.indices.new_zeros(1))
        self.selection = selection
