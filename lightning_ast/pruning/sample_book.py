"""What a run of mode ``prune`` knows of each sample beside its score: the user's rules, and a record to read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
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


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What the user asks for single samples; :class:`~lightning_ast.SparseSelectionCallback` describes each."""

    initial_scores: ScoreSource | None = None
    keep_scores: int = 0
    always: IndexSet | None = None
    never: IndexSet | None = None
    class_floor: float = 0.0

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

    def prepare(self, history: SignificanceHistory) -> None:
        """Give a new history its rules and its record.

        Raises:
            ConfigurationError: Indices do not fit the data set.
        """
        settings = self.settings
        sets = {name: self._indices(name, len(history)) for name in ("always", "never")}
        if sets["always"] is not None and sets["never"] is not None and bool((sets["always"] & sets["never"]).any()):
            both = int((sets["always"] & sets["never"]).nonzero()[0])
            raise ConfigurationError([f"always and never: expected each index in one of them, got {both} in both."])
        history.rules = PlanRules(**sets, class_floor=settings.class_floor)
        history.record = SampleRecord(len(history), epochs=settings.keep_scores, labels=settings.wants_labels)

    def begin(self, history: SignificanceHistory) -> None:
        """Let a run that goes on from nothing begin with the user's scores."""
        source = self.settings.initial_scores
        if source is None:
            return
        if ("scores", len(history)) not in self._read:
            self._read["scores", len(history)] = read_scores(source, len(history))
        scores, labels = self._read["scores", len(history)]
        history.begin_with(scores)
        assert history.record is not None
        history.record.tell(torch.arange(len(history)), labels)

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

    def load_state_dict(self, history: SignificanceHistory, state: dict[str, Any] | None) -> None:
        """Continue the record of a checkpoint; that of an older release has none."""
        if state is not None and history.record is not None and len(state["times"]) == len(history):
            history.record.load_state_dict(state, first=self.processes.rank == 0)
