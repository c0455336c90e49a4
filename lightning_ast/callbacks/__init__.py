"""The four public callbacks, one file each, and what keeps a callback object to one fit at a time."""

from lightning_ast.callbacks.energy_monitor import EnergyMonitor, EpochCosts
from lightning_ast.callbacks.monitor import SparseTrainingMonitor
from lightning_ast.callbacks.sparse_selection import SparseSelectionCallback
from lightning_ast.callbacks.two_stage import TwoStageScheduler
from lightning_ast.errors import CheckpointError, ConfigurationError, QuarantineError
from lightning_ast.selection.quarantine import QuarantinedSample

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "EnergyMonitor",
    "EpochCosts",
    "QuarantineError",
    "QuarantinedSample",
    "SparseSelectionCallback",
    "SparseTrainingMonitor",
    "TwoStageScheduler",
]
