"""What the parts of one fit share: made once, and handed to each of them."""

from __future__ import annotations

from collections import Counter

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_ast.core.ledger import Ledger
from lightning_ast.lightning_internals.distributed import Processes
from lightning_ast.selection.accumulation import AccumulationWindow
from lightning_ast.selection.moving_target import MovingTarget
from lightning_ast.selection.quarantine import Quarantine
from lightning_ast.selection.sample_count import SampleCount
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.selection.watcher import Watcher

__all__ = ["FitParts"]


class FitParts:
    """The objects of one fit that several parts of it read; ``owner`` is the selection callback."""

    def __init__(
        self,
        owner: Callback,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        settings: SelectionSettings,
        *,
        ledger: Ledger,
        dense_ops: Counter[str],
    ) -> None:
        self.owner = owner
        self.trainer = trainer
        self.module = module
        self.settings = settings
        self.ledger = ledger
        self.dense_ops = dense_ops
        self.selector = settings.selector(trainer.global_rank)
        rule = settings.target_rule
        self.target = None if rule is None else MovingTarget(rule, self.selector, trainer)
        self.processes = Processes(trainer)
        self.quarantine = Quarantine(settings.quarantine_limit, self.processes)
        self.window = AccumulationWindow()
        self.samples = SampleCount(trainer, module)
        self.watchers: list[Watcher] = []
