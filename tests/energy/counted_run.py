"""A counter that counts what the test says, and a run that it measures."""

from __future__ import annotations

import math

from lightning_ast.energy import EnergyUnavailableError

__all__ = ["BATCHES", "Meter"]

BATCHES = 8  # of 64 in 512 digits


class Meter:
    """Counts what steps say that they draw."""

    longest_interval_seconds = math.inf

    def __init__(self, kind: str = "gpu", identity: str = "the GPU") -> None:
        self.name, self.kind, self.identity = f"{kind} of the test", kind, identity
        self.joules, self.reads, self.broken = 500.0, 0, False

    def read_joules(self) -> float:
        if self.broken:
            raise EnergyUnavailableError("the counter fell off")
        self.reads += 1
        return self.joules
