"""Adaptive Sparse Training for PyTorch Lightning: score the samples of a batch, train on those that teach most."""

from typing import TYPE_CHECKING

from lightning_ast.__about__ import __version__

if TYPE_CHECKING:
    from lightning_ast.callbacks import (
        CheckpointError,
        ConfigurationError,
        EnergyMonitor,
        QuarantineError,
        SparseSelectionCallback,
        SparseTrainingMonitor,
        TwoStageScheduler,
    )
    from lightning_ast.core import EntryError, LossCaptureError, PIController
    from lightning_ast.mixin import SparseLossMixin

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "EnergyMonitor",
    "EntryError",
    "LossCaptureError",
    "PIController",
    "QuarantineError",
    "SparseLossMixin",
    "SparseSelectionCallback",
    "SparseTrainingMonitor",
    "TwoStageScheduler",
    "__version__",
]

# The names are imported when they are first asked for: `lightning-ast --version` must not wait for torch.
_MODULES = ("callbacks", "core", "mixin", "energy")

if not TYPE_CHECKING:  # a type checker would otherwise believe that any name is here

    def __getattr__(name: str) -> object:
        """Import a public name, or one of the modules that hold them, when it is first asked for (PEP 562)."""
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in __all__:
            for holder in _MODULES:
                module = import_module(f"{__name__}.{holder}")
                if name in module.__all__:
                    globals()[name] = getattr(module, name)
                    return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Name what is here and what comes when it is asked for."""
        return sorted({*globals(), *__all__, *_MODULES})
