"""Step 2, beside the trace of the last sample: that of an inner one, to see whether the order of the batch stays.

A step that sorts or shuffles its batch may leave the last sample in its place. Then the rows of that one are where they
are looked for, and those of the others are not.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_ast.core.dependence.perturbed import Take
from lightning_ast.core.dependence.records import GraphNode
from lightning_ast.core.dependence.trace import SampleTrace
from lightning_ast.core.partial.rows import Place, UnequalPlace

__all__ = ["OrderedTrace"]


class OrderedTrace(SampleTrace):  # type: ignore[no-untyped-call]
    """Follows the last sample as :class:`SampleTrace` does, and beside it one within the batch.

    Args:
        batch: The batch of the step, on its device.
        batch_size: The number of samples B.
        take: As in :class:`SampleTrace`.
        only: As in :class:`SampleTrace`.

    Attributes:
        beside: The traces of other samples, which are entered, paused and released with this one.
    """

    def __init__(self, batch: Any, batch_size: int, *, take: Take | None = None, only: int | None = None) -> None:
        self.beside: list[SampleTrace] = []  # before all else: setting `paused` reads it
        super().__init__(batch, batch_size, take=take, only=only)
        self._batch_size = batch_size
        # A sort by an odd number of groups often leaves the sample in the middle in its place.
        self._place = 3 * max(0, batch_size - 1) // 8
        self._inner = SampleTrace(batch, batch_size, take=take, only=only, sample=self._place)
        self.beside = [self._inner]

    @property
    def paused(self) -> bool:
        """Return whether operations pass without being followed."""
        return self._paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self._paused = value
        for trace in self.beside:
            trace.paused = value

    def __enter__(self) -> OrderedTrace:
        for trace in self.beside:  # itself at last: it then sees each operation first, as without the others
            trace.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for trace in reversed(self.beside):
            trace.__exit__(*error)

    def release(self) -> None:
        """Drop every tensor held."""
        super().release()
        for trace in self.beside:
            trace.release()

    def changes(self, node: GraphNode, output_nr: int, place: Place) -> tuple[float, float] | None:
        """Return how much the inner sample changes its own rows of an output, and those of the others.

        The samples are where ``place`` has them. None where the sample changes nothing, or where nothing is known.
        """
        found = self._inner.dependence(node, output_nr)
        if found is None or found.independent:
            return None
        profile = found.profiles[place.dim]
        if isinstance(place, UnequalPlace):
            own = place.assignment.cpu() == self._place
        else:
            own = (torch.arange(len(profile)) // place.post) % self._batch_size == self._place
        return float(profile[own].sum()), float(profile[~own].sum())

    def is_elsewhere(self, node: GraphNode, output_nr: int, place: Place) -> bool:
        """Tell whether the inner sample changes rows of an output that are not its own, and none that are."""
        changes = self.changes(node, output_nr, place)
        return changes is not None and changes[0] == 0 < changes[1]  # both are 0 where NaN hides what changes
