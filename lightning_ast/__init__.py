"""Adaptive Sparse Training for PyTorch Lightning: score the samples of a batch, train on those that teach most."""

from lightning_ast.callbacks import (
    CheckpointError,
    ConfigurationError,
    EnergyMonitor,
    QuarantineError,
    SparseSelectionCallback,
    SparseTrainingMonitor,
    TwoStageScheduler,
)
from lightning_ast.core import LossCaptureError, PIController
from lightning_ast.mixin import SparseLossMixin

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "EnergyMonitor",
    "LossCaptureError",
    "PIController",
    "QuarantineError",
    "SparseLossMixin",
    "SparseSelectionCallback",
    "SparseTrainingMonitor",
    "TwoStageScheduler",
    "__version__",
]
