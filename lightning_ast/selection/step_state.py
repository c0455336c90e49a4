"""The batch of one training step: the facts that are known before it, and what becomes of it while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from lightning_ast.core.gate import Selection
from lightning_ast.core.gradient_gate import Execution

__all__ = ["BatchFacts", "Part", "StepState", "Treatment"]


class Treatment(Enum):
    """What is done to the gradient of a batch where it enters the network."""

    DENSE = "dense"  # nothing: the step is the plain run's
    OBSERVED = "observed"  # nothing, but the significance of every sample is computed
    CLEANED = "cleaned"  # the rows of samples that are not finite are left out
    SELECTED = "selected"  # the rows of a selection are kept, with its weights
    # A sparse batch that is trained on as a dense one, because a selection of it would cost more than it saves. It
    # counts like any selection where processes and micro-batches are weighed together.
    WHOLE = "whole"
    WEIGHTED = "weighted"  # every row is kept, with the user's weights; it counts as a dense step


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """What is known of a batch of ``size`` samples before its step begins."""

    size: int
    sizes: tuple[int, ...] = ()  # of the parts that several loaders put into it
    indices: Tensor | None = None  # (B,) dataset indices of its samples, where they are known
    # In prune, the samples of a dense epoch that the batch stands for. Elsewhere it stands for its own.
    stands_for: int | None = None
    # Receives the significance (B,) of the samples, where something remembers it.
    observe: Callable[[Tensor], None] | None = None
    is_planned: bool = False  # its samples are a selection that was made ahead of the epoch
    # Of a sparse epoch that is loaded whole, because a selection would leave out so few samples that it costs more than
    # it saves: the ledger counts it as a dense step of the sparse stage.
    is_of_whole_epoch: bool = False
    execution: Execution = "mask"


@dataclass(frozen=True)
class Part:
    """The selected samples of a batch, which are all that a step of ``subset`` sees."""

    batch: Any
    norms: Tensor  # (k,) of their gradients in the scoring pass, times the samples B of the whole batch
    take: Callable[[Any, Tensor], Any]  # takes positions among them, out of the whole batch


@dataclass
class StepState:
    """What becomes of a batch, from the start of its step to the end."""

    facts: BatchFacts
    treatment: Treatment = Treatment.DENSE
    # Made once for every loss, closure and backward of the batch: LBFGS, say, evaluates one selection several times.
    # It may hold no sample. None before it is made, and where all samples are trained on.
    selection: Selection | None = None
    part: Part | None = None  # in subset alone: elsewhere the step sees the whole batch
    significance: Tensor | None = None  # (B,)
    labels: Tensor | None = None  # (B,) class indices, as the module or, once there is a score, a loss function tells
    user_weights: Tensor | None = None  # (B,) in double precision on the host; None where all weigh alike
    bad: Tensor | None = None  # (B,) bool, the samples that are not finite; None where the host knows of none
    traced: bool = False  # a sample is followed through the forward, which holds every tensor of it
    is_scored_ahead: bool = False  # a scoring pass had all samples: it has to be paid for, whatever is selected

    @property
    def batch_size(self) -> int:
        """Return the number B of samples in the batch."""
        return self.facts.size

    @property
    def indices(self) -> Tensor | None:
        """Return ``(B,)`` dataset indices of the samples, or None where they are not known."""
        return self.facts.indices

    @property
    def offered(self) -> int:
        """Return the number of samples that a dense run would have trained on in place of this batch."""
        return self.facts.size if self.facts.stands_for is None else self.facts.stands_for

    @property
    def selected(self) -> int:
        """Return the number of samples that are trained on."""
        return self.facts.size if self.selection is None else self.selection.indices.numel()

    @property
    def forwarded(self) -> int:
        """Return the number of samples that the forward of the step sees."""
        return self.facts.size if self.part is None else self.selected

    @property
    def selects(self) -> bool:
        """Tell whether the gate keeps the rows of a selection."""
        return self.treatment is Treatment.SELECTED

    @property
    def is_whole(self) -> bool:
        """Tell whether it is trained on whole where a selection would cost more than it saves."""
        return self.treatment is Treatment.WHOLE

    @property
    def counts_as_one_batch(self) -> bool:
        """Tell whether all rows are kept, and weighed together with those of other processes and micro-batches."""
        return self.treatment in (Treatment.WHOLE, Treatment.WEIGHTED)

    @property
    def is_gated(self) -> bool:
        """Tell whether something is to be done where the gradient enters the network."""
        return self.treatment is not Treatment.DENSE

    @property
    def is_void(self) -> bool:
        """Tell whether no sample can be trained on: the gradient of the step is zero."""
        return self.selected == 0

    @property
    def may_spare_rows(self) -> bool:
        """Tell whether the backward may leave out samples of the forward; the selection need not be made yet."""
        return self.facts.execution == "partial" and self.selects

    @property
    def has_spared_rows(self) -> bool:
        """Tell whether the backward left out samples of the forward."""
        return self.may_spare_rows and 0 < self.selected < self.facts.size

    @property
    def known_bad(self) -> bool:
        """Tell whether the host knows, without waiting for a device, that samples are not finite."""
        return self.bad is not None and self.bad.device.type == "cpu"

    def weigh(self, weights: Tensor) -> None:
        """Multiply the rows of the samples by the user's weights ``(B,)``, on top of those that they have."""
        self.user_weights = weights if self.user_weights is None else self.user_weights * weights
        if self.treatment in (Treatment.DENSE, Treatment.OBSERVED):
            self.treatment = Treatment.WEIGHTED

    def quarantine(self, bad: Tensor) -> None:
        """Add samples ``(B,)`` that are not finite to those that are known."""
        self.bad = bad if self.bad is None else bad | self.bad.to(bad.device)
