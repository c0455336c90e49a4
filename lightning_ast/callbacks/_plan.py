"""What is to be done with the current batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_ast.core.gate import Selection

__all__ = ["BatchPlan"]


@dataclass
class BatchPlan:
    """What is to be done with the current batch; it lives from its start to its end.

    Attributes:
        batch_size: samples of the batch.
        sparse: whether a selection is trained on; False only watches.
        selection: in ``mask`` and ``partial`` None until the losses are there; then kept, so that an optimizer that
            evaluates the step several times (LBFGS) sees one objective.
        sub_batch: the selected samples, for ``subset``.
        full_loss: scalar, the user's loss of the whole batch, where scoring has seen it.
        total_count: scalar, the user's denominator over the whole batch, where scoring has seen it.
        elements: loss elements of a sample, where scoring has seen them.
        partial: whether the backward computes over the selected rows alone.
        stands_for: in ``prune``, samples of a dense epoch that the batch stands for; None elsewhere: its own.
        observe: told the significance ``(B,)`` of the batch as it is trained on, or None.
        indices: ``(B,)`` dataset indices of its samples, where they are known.
        significance: ``(B,)``, where it was computed.
        labels: ``(B,)`` class indices, where the loss has them and the significance was computed.
        batch: what is trained on in place of the loaded batch, or None: samples that are not finite are replaced.
        bad: ``(B,)`` bool, samples that are not finite; None where the host knows of none.
        leave_out: the selection is every sample but the bad ones; its losses are averaged without weights.
        lost: its loss is not finite, and which sample's is not known.
        void: no sample can be trained on; the selection stands for none, and the step has a gradient of zero.
        seen: the loss handed to the user's code in the running call, once for each interception.
    """

    batch_size: int
    sparse: bool
    partial: bool = False
    stands_for: int | None = None
    observe: Callable[[Tensor], None] | None = None
    selection: Selection | None = None
    sub_batch: Any = None
    full_loss: Tensor | None = None
    total_count: Tensor | None = None
    elements: int | None = None
    indices: Tensor | None = None
    significance: Tensor | None = None
    labels: Tensor | None = None
    batch: Any = None
    bad: Tensor | None = None
    leave_out: bool = False
    lost: bool = False
    void: bool = False
    seen: list[Tensor] = field(default_factory=list)

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
    def spares_rows(self) -> bool:
        """Whether the backward leaves samples of the forward out."""
        return self.partial and self.sparse and self.selected < self.batch_size

    @property
    def known_bad(self) -> bool:
        """Whether the host knows, without waiting for a device, that samples are not finite."""
        return self.bad is not None and self.bad.device.type == "cpu"

    def quarantine(self, bad: Tensor) -> None:
        """These samples ``(B,)`` are not finite, besides those that are known."""
        self.bad = bad if self.bad is None else bad | self.bad.to(bad.device)

    def note(self, significance: Tensor, labels: Tensor | None) -> None:
        """What the samples ``(B,)`` are worth, and their classes where these are known; for those who watch."""
        self.significance, self.labels = significance.detach(), labels

    def select(self, selection: Selection) -> None:
        """Train on this selection; where it is empty, on nothing."""
        if selection.indices.numel() == 0:
            self.void = True
            selection = Selection(selection.indices.new_zeros(1))
        self.selection = selection
