"""Step 2 for a batch that is made of several loaders' batches: follow one sample of each through the forward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lightning_ast.core.dependence.perturbed import Pair, Take, perturbed
from lightning_ast.core.dependence.trace import SampleTrace

__all__ = ["SeveralTrace"]


class SeveralTrace(SampleTrace):  # type: ignore[no-untyped-call]
    """Follows one sample of each part of a batch; the samples of all parts are counted in one row.

    Their positions within the parts differ, and every part has as many, so that rows show it where they mix samples of
    several parts.

    Args:
        parts: The batches of the loaders, on their device.
        sizes: The number of samples in each; each is larger than the number of parts.
    """

    def __init__(self, parts: Sequence[Any], sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        super().__init__(parts, sum(sizes))
        starts = [0, *accumulate(sizes)]
        self.sample = tuple(start + place for start, place in zip(starts, self._places(), strict=False))

    def _places(self) -> range:
        last = min(self._sizes) - 1
        return range(last, last - len(self._sizes), -1)

    def _changed(self, batch: Any, batch_size: int, take: Take | None) -> list[Pair]:
        parts = zip(batch, self._sizes, self._places(), strict=True)
        return [pair for part, size, place in parts for pair in perturbed(part, size, place)]
