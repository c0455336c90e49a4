"""What other callbacks may be told of while a fit goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning_ast.schedule import Stage
from lightning_ast.selection.step_state import StepState

__all__ = ["Watcher"]


class Watcher:
    """Told of what a fit does to each batch; it changes nothing.

    Attributes:
        wants_labels: Whether the classes of the samples are of use to it.
    """

    wants_labels = False

    def start_stage(self, stage: Stage) -> None:
        """A batch of another stage than the last one's is about to be trained on."""

    def scoring(self) -> AbstractContextManager[None]:
        """Entered around the scoring forward of ``subset``."""
        return nullcontext()

    def indices(self, batch_size: int) -> Any:
        """``(B,)`` dataset indices of the batch that starts, or None where they are not known."""
        return None

    def finish_batch(self, step: StepState) -> None:
        """A batch was trained on as planned."""
