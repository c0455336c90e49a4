"""Step 2 for a batch that is made of several loaders' batches: follow one sample of each through the forward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lightning_ast.core.dependence.perturbed import Pair, Take, perturbed
from lightning_ast.core.dependence.trace import SampleTrace

__all__ = ["SeveralTrace"]


class SeveralTrace(SampleTrace):  # type: ignore[no-untyped-call]
    """Follows the last sample of the first part of a batch, the last but one of the second, and so on.

    The samples of all parts are counted in one row. Because the positions within the parts differ, rows that belong to
    one part are told from those of another of the same size.

    Args:
        parts: The batches of the loaders, on their device.
        sizes: The number of samples in each; each is larger than the number of parts.
    """

    def __init__(self, parts: Sequence[Any], sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)
        super().__init__(parts, sum(sizes))
        self.sample = tuple(end - 1 - k for k, end in enumerate(accumulate(sizes)))

    def _changed(self, batch: Any, batch_size: int, take: Take | None) -> list[Pair]:
        parts = enumerate(zip(batch, self._sizes, strict=True))
        return [pair for k, (part, size) in parts for pair in perturbed(part, size, size - 1 - k)]
