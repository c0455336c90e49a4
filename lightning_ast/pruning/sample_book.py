"""What a run of mode ``prune`` knows of each sample beside its score: the user's rules, and a record to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ast.core.history import SignificanceHistory
from lightning_ast.core.plan_rules import PlanRules
from lightning_ast.core.sample_record import SampleRecord
from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.pruning.score_files import IndexSet, ScoreSource, read_indices, read_scores

__all__ = ["SampleBook", "SampleOptions", "SampleSettings"]


class SampleOptions(TypedDict, total=False):
    """The fields of :class:`SampleSettings` as keyword arguments."""

    initial_scores: ScoreSource | None
    keep_scores: int
    always: IndexSet | None
    never: IndexSet | None
    class_floor: float
    own_parts: bool


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What the user asks for single samples; :class:`~lightning_ast.SparseSelectionCallback` describes each."""

    initial_scores: ScoreSource | None = None
    keep_scores: int = 0
    always: IndexSet | None = None
    never: IndexSet | None = None
    class_floor: float = 0.0
    own_parts: bool = False

    @classmethod
    def of(cls, options: SampleOptions) -> SampleSettings:
        """Make the settings from the callback's other arguments, and refuse a name that it does not know."""
        if unknown := sorted(options.keys() - SampleOptions.__annotations__.keys()):
            raise TypeError(f"SparseSelectionCallback got an unexpected keyword argument {unknown[0]!r}")
        return cls(**options)

    @property
    def wants_labels(self) -> bool:
        """Tell whether the classes of the samples are looked for."""
        return self.class_floor > 0 or self.keep_scores > 0


@dataclass
class SampleBook:
    """Prepares the history of a data set, and keeps its record in the checkpoint."""

    settings: SampleSettings
    processes: Processes
    _read: dict[tuple[str, int], Any] = field(default_factory=dict)  # files are read once

    def make_history(self, size: int, saved: dict[str, Any], *, must_fit: bool) -> SignificanceHistory:
        """Make the history of a data set with its rules and its record, and continue what was saved of it.

        Args:
            size: The number of samples in the data set.
            saved: The epochs' part of a state, or nothing: then the run begins with the user's scores.
            must_fit: Whether a state of a data set of another size is refused, and not forgotten with a warning.

        Raises:
            ConfigurationError: A setting or the state does not fit the data set.
        """
        history = SignificanceHistory(size)
        history.rules = self._rules(size)
        history.record = SampleRecord(size, epochs=self.settings.keep_scores, labels=self.settings.wants_labels)
        if saved.get("history") is None:
            self._begin(history, history.record)
            return history
        try:
            history.load_state_dict(saved["history"])
        except ValueError as error:
            if must_fit:
                raise ConfigurationError([str(error)]) from error
            rank_zero_warn("lightning-ast: the data set is not the last fit's: what was remembered is forgotten.")
            return history
        record = saved.get("samples")  # an older release has written none
        if record is not None:
            history.record.load_state_dict(record, first=self.processes.rank == 0)
        return history

    def _rules(self, size: int) -> PlanRules:
        always = self._indices("always", size)
        never = self._indices("never", size)
        if always is not None and never is not None and bool((always & never).any()):
            both = int((always & never).nonzero()[0])
            raise ConfigurationError([f"always and never: expected each index in one of them, got {both} in both."])
        return PlanRules(always, never, self.settings.class_floor)

    def _begin(self, history: SignificanceHistory, record: SampleRecord) -> None:
        source = self.settings.initial_scores
        if source is None:
            return
        size = len(history)
        if ("scores", size) not in self._read:
            self._read["scores", size] = read_scores(source, size)
        scores, labels = self._read["scores", size]
        history.begin_with(scores)
        record.tell(torch.arange(size), labels)

    def _indices(self, name: str, size: int) -> Tensor | None:
        source = getattr(self.settings, name)
        if source is None:
            return None
        if (name, size) not in self._read:
            self._read[name, size] = read_indices(name, source, size)
        chosen: Tensor = self._read[name, size]
        return chosen

    def state_dict(self, history: SignificanceHistory | None) -> dict[str, Any] | None:
        """Return the record over all processes; every process must ask for it."""
        if history is None or history.record is None:
            return None
        if self.processes.count == 1 or self.processes.failing:
            return history.record.state_dict()
        return history.record.state_dict(self.processes.total, self.processes.maximum)
