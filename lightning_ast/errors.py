"""Every error that this package raises for its user to read."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AdviceError",
    "BatchError",
    "CheckpointError",
    "ConfigurationError",
    "DataNotFoundError",
    "EmptyBatchError",
    "EnergyUnavailableError",
    "EntryError",
    "LossCaptureError",
    "MissingPackageError",
    "QuarantineError",
    "ReportError",
    "UsageError",
    "WeightsNotFoundError",
]


class ConfigurationError(ValueError):
    """Everything that is wrong with a set-up, each with what to do.

    Attributes:
        faults: A sentence for each fault.
    """

    def __init__(self, faults: str | list[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else faults
        shown = "\n".join(f"- {fault}" for fault in self.faults)
        super().__init__(f"lightning-ast cannot run with this configuration:\n{shown}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Python makes a pickled exception anew from its message alone, as where it comes from another process.
        return type(self), (self.faults,)


class CheckpointError(ValueError):
    """The state of a callback in a checkpoint cannot be used.

    Attributes:
        owner: The callback whose state it is.
        reason: What is wrong with the state.
    """

    def __init__(self, owner: str, reason: str) -> None:
        self.owner = owner
        self.reason = reason
        super().__init__(
            f"lightning-ast cannot use the state of {owner} in this checkpoint: {reason}.\n"
            f"Or resume from another checkpoint; to begin anew with this part alone, remove {owner!r} from the "
            "checkpoint's 'callbacks'."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.owner, self.reason)


class QuarantineError(RuntimeError):
    """More samples of an epoch are not finite than ``quarantine_limit`` allows."""


class BatchError(ValueError):
    """A batch has no recognisable batch dimension; the message tells what to override."""


class EmptyBatchError(BatchError):
    """A batch holds no sample."""


class EntryError(RuntimeError):
    """The rows of the samples cannot be found in the graph of a loss."""


class LossCaptureError(RuntimeError):
    """Per-sample losses cannot be taken from this training step; the message names the remedy."""


class EnergyUnavailableError(RuntimeError):
    """This machine, or this process, cannot read the counter; the message tells why and what would help."""


class ReportError(RuntimeError):
    """No report can be written; the message tells why, and what to do."""


class AdviceError(RuntimeError):
    """Something that was asked for cannot be measured; the message tells what to change."""


class DataNotFoundError(FileNotFoundError):
    """The images are nowhere to be found; the message names every way to provide them."""


class WeightsNotFoundError(FileNotFoundError):
    """Pretrained weights are nowhere to be found; the message names every way to provide them."""


class MissingPackageError(ModuleNotFoundError):
    """An optional package is not installed; the message names the extra that brings it."""


class UsageError(Exception):
    """The arguments or the configuration cannot be used; the message is one line."""
