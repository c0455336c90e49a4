"""Which forwards are traced: the first one, and one behind each graph of a new form, up to a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_ast.core.dependence.trace import SampleTrace

__all__ = ["Traces"]

_MOST = 8
"""Forwards that are traced for graphs of a new form, and for a first proof, at most."""


class Traces:
    """Decides which forwards of one kind are traced: those of the training steps, or those of the scoring passes.

    Args:
        take: ``(batch, indices) -> batch``, the user's own way to take samples, or None.
        enabled: Whether anything is ever selected or scored.

    Attributes:
        attempts: Traces that a loss came of; a step may return none.
    """

    def __init__(self, take: Callable[[Any, Tensor], Any] | None, *, enabled: bool) -> None:
        self._take = take
        self._wanted = enabled
        self._started = 0
        self._counted = False
        self._proved = False
        self.attempts = 0

    def wanted(self, batch_size: int) -> bool:
        """Tell whether the next forward is to be traced."""
        return self._wanted and batch_size > 1

    @property
    def exhausted(self) -> bool:
        """Whether no further forward will be traced."""
        return self._started >= _MOST

    @property
    def hopeless(self) -> bool:
        """Whether nothing was proved by any trace, and none will follow."""
        return not self._proved and not self._wanted and self.attempts > 0

    def start(self, batch: Any, batch_size: int, *, take: Callable[[Any, Tensor], Any] | None = None) -> SampleTrace:
        """Make the trace of a forward; where a first one proved nothing, of another part of the batch.

        Args:
            batch: What the forward gets.
            batch_size: Its samples.
            take: Takes samples of it, where it is itself a part of a batch.
        """
        self._started += 1
        self._counted = False
        only = None if self.attempts == 0 or self._proved else self.attempts - 1
        return SampleTrace(batch, batch_size, take=take or self._take, only=only)

    def note_proof(self, *, proved: bool) -> None:
        """Count a trace that a loss came of, and whether it proved anything."""
        self.attempts += not self._counted
        self._counted = True
        self._proved = self._proved or proved

    def is_last(self, trace: SampleTrace) -> bool:
        """Tell whether all parts of the batch have been tried with this trace."""
        parts = min(trace.parts, _MOST - 1) if trace.parts > 1 else 0
        return self.attempts > parts

    def note_new_form(self) -> None:
        """Trace the next forward too."""
        self._wanted = not self.exhausted

    def end(self, trace: SampleTrace) -> None:
        """Let go of a trace; the next forward is traced too where nothing was proved but may be."""
        trace.release()
        self._wanted = not self._proved and not self.exhausted and trace.failure is None
