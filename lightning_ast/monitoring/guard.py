"""A guard around what only measures or shows: it may fail without an effect on the training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["Guard"]


class Guard:
    """A catcher of the failures of a part that training does not need; it warns of the first.

    Attributes:
        seconds: The time that the part took.
    """

    def __init__(self, part: str) -> None:
        self._part = part
        self._warned = False
        self.seconds = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the code inside; warn of its first failure instead of raising an error."""
        # Nothing that all processes must call together belongs inside: one that fails would leave the others waiting.
        began = time.perf_counter()
        try:
            yield
        except Exception as error:  # whatever it is: a full disk, a closed terminal, a data set of an unusual kind
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"lightning-ast: {self._part} failed, and training goes on without it: "
                    f"{type(error).__name__}: {error}"
                )
        finally:
            self.seconds += time.perf_counter() - began
