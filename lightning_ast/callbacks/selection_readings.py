"""What can be read of the selection callback: its books, and the values of the last batch of its fit."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from lightning_ast.core.gate import Selection
from lightning_ast.core.ledger import Ledger
from lightning_ast.mode_facts import Mode
from lightning_ast.pruning.score_files import write_parts
from lightning_ast.schedule import Stage
from lightning_ast.selection.quarantine import QuarantinedSample
from lightning_ast.selection.session import Session

__all__ = ["SelectionReadings"]


class SelectionReadings(Callback):
    """The base of ``SparseSelectionCallback`` that reads the running or the last fit, and changes nothing.

    Attributes:
        ledger: The samples, FLOPs and seconds of the run.
    """

    mode: Mode

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self._session: Session | None = None

    @property
    def session(self) -> Session | None:
        """Return the parts of the running or the last fit; None before the first."""
        return self._session

    @property
    def stage(self) -> Stage:
        """Return the stage of the last training batch: ``"warmup"``, ``"sparse"`` or ``"cooldown"``."""
        return "warmup" if self._session is None else self._session.stage

    @property
    def activation_rate(self) -> float | None:
        """Return selected / offered of the last training batch, in [0, 1]; None before the first."""
        return None if self._session is None else self._session.activation_rate

    @property
    def coverage(self) -> float | None:
        """Return the share of the last batch's significance that is trained on, in [0, 1]; None before the first.

        In ``prune`` it is that of the epoch's plan.
        """
        return None if self._session is None else self._session.coverage

    @property
    def last_selection(self) -> Selection | None:
        """Return positions and weights of the samples that the last batch was trained on, or None."""
        return None if self._session is None else self._session.last_selection

    @property
    def threshold(self) -> float | None:
        """Return the significance at which the gate was fully open in the last sparse batch; None before it."""
        last = None if self._session is None else self._session.selector.last_threshold
        return None if last is None else float(last)

    @property
    def savings(self) -> dict[str, float | None]:
        """Return the shares saved so far, by what was saved; see :meth:`lightning_ast.core.Ledger.savings`."""
        return self.ledger.savings()

    def export_scores(self, path: str | Path) -> None:
        """Write what ``prune`` remembers of each sample to a file: CSV, or Parquet by the ending ``.parquet``.

        The columns are ``index``, ``label`` (with ``keep_scores`` or ``class_floor``), ``times_selected``,
        ``significance`` and, for each epoch that ``keep_scores`` keeps, ``significance_epoch_E``. With several
        processes every one of them must call it, and the first one writes: one file, or with ``own_parts`` one for each
        process, ``NAME-partR`` for that of rank R.

        Raises:
            ValueError: Nothing is remembered: there was no fit, or its mode was another one.
        """
        state = self.state_dict()
        epochs = state.get("epochs")
        if epochs is None or epochs["history"] is None:
            raise ValueError(
                "there are no scores to export: only mode='prune' remembers samples, from its first fit on."
            )
        rank_zero_only(write_parts)(path, state)

    @property
    def quarantined(self) -> list[QuarantinedSample]:
        """List the samples that this process left out because they are not finite, in the order they were found in."""
        return [] if self._session is None else list(self._session.quarantine.samples)
