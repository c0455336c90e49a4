"""For command line scripts of your own: importing this makes the callbacks known to LightningCLI by their short names.

``main`` is the command ``lightning-ast``; see :mod:`lightning_ast.__main__`, which starts without torch.
"""

from lightning_ast.__main__ import main
from lightning_ast.callbacks import EnergyMonitor, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler

__all__ = ["EnergyMonitor", "SparseSelectionCallback", "SparseTrainingMonitor", "TwoStageScheduler", "main"]
