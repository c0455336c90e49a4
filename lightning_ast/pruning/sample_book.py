"""What a run of mode ``prune`` knows of each sample beside its score: the user's rules, and a record to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ast.core.history import SignificanceHistory
from lightning_ast.core.plan_rules import PlanRules
from lightning_ast.core.sample_record import SampleRecord
from lightning_ast.errors import ConfigurationError
from lightning_ast.pruning.score_files import IndexSet, ScoreSource, read_indices, read_scores

__all__ = ["SampleOptions", "SampleSettings", "make_history"]


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


def make_history(
    settings: SampleSettings, size: int, saved: dict[str, Any], *, must_fit: bool, first: bool
) -> SignificanceHistory:
    """Make the history of a data set with its rules and its record; continue what was saved, or the user's scores.

    What was saved of a data set of another size is refused if it ``must_fit``, else it is forgotten with a warning. The
    ``first`` process goes on with the counts of all.
    """
    history = SignificanceHistory(size)
    history.rules = _rules(settings, size)
    history.record = SampleRecord(size, epochs=settings.keep_scores, labels=settings.wants_labels)
    if saved.get("history") is None:
        if settings.initial_scores is not None:
            scores, labels = read_scores("initial_scores", settings.initial_scores, size)
            history.begin_with(scores)
            history.record.tell(torch.arange(size), labels)
        return history
    try:
        history.load_state_dict(saved["history"])
    except ValueError as error:
        if must_fit:
            raise ConfigurationError(str(error)) from error
        rank_zero_warn("lightning-ast: the data set is not the last fit's: what was remembered is forgotten.")
        return history
    if saved.get("samples") is not None:  # an older release has written none
        history.record.load_state_dict(saved["samples"], first=first)
    return history


def _rules(settings: SampleSettings, size: int) -> PlanRules:
    always = None if settings.always is None else read_indices("always", settings.always, size)
    never = None if settings.never is None else read_indices("never", settings.never, size)
    if always is not None and never is not None and bool((always & never).any()):
        both = int((always & never).nonzero()[0])
        raise ConfigurationError(f"always and never: expected each index in one of them, got {both} in both.")
    return PlanRules(always, never, settings.class_floor)
