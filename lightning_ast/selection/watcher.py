"""What other callbacks may be told of while a fit goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from lightning_ast.schedule import Stage
from lightning_ast.selection.step_state import StepState

__all__ = ["Watcher"]


class Watcher:
    """A part of another callback that is told of what a fit does to each batch; it changes nothing."""

    wants_labels = False  # the classes of the samples, for which losses must be watched in every sparse step

    def start_stage(self, stage: Stage) -> None:
        """Receive the stage of the batch that starts, where it is another than that of the last one."""

    def scoring(self) -> AbstractContextManager[None]:
        """Return a context that is entered around the scoring forward of ``subset``."""
        return nullcontext()

    def indices(self, batch_size: int) -> Tensor | None:
        """Return ``(B,)`` dataset indices of the batch that starts, or None where they are not known."""
        return None

    def finish_batch(self, step: StepState) -> None:
        """Receive the state of a step that was trained on."""
