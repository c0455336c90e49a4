"""The policies of the regime map: what is put into the Trainer for each, everything else being equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from regime_data import Chooser
from regime_networks import ClassifierModule, ProgressModule
from regime_run import Run
from rules import InfoBatch, OrderDP, RandomShare, SeTa, composer_probabilities, composer_selects
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler

__all__ = ["POLICIES", "Parts", "parts_of", "source_of", "stages"]


@dataclass
class Parts:
    """What a policy adds to an ordinary run.

    Attributes:
        module: The class of the module.
        callbacks: The callbacks of the Trainer.
        chooser: The rule that chooses the samples of each epoch, where it is none of ours.
    """

    module: type[ClassifierModule] = ClassifierModule
    callbacks: list[Callback] = field(default_factory=list)
    chooser: Chooser | None = None


class SelectiveBackpropModule(ClassifierModule):
    """Selective Backprop as Composer has it: a forward of all, then a step of its own on those that were drawn."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        done = self.trainer.current_epoch / (self.trainer.max_epochs or 1)
        if composer_selects(done, batch_idx):
            self.forwarded += len(labels)
            with torch.no_grad():  # in training mode, as there: BatchNorm sees the batch twice
                losses = F.cross_entropy(self(images), labels, reduction="none")
            probabilities = composer_probabilities(losses, 0.5)
            rows = torch.multinomial(probabilities, int(0.5 * len(labels))).to(labels.device)
            images = images[rows]
            labels = labels[rows]
        self.forwarded += len(labels)
        self.backwarded += len(labels)
        return F.cross_entropy(self(images), labels)


def stages(epochs: int) -> tuple[int, int]:
    """Return the dense epochs at the beginning and at the end of a pruned run, where a run does not give them."""
    return max(1, epochs // 12), max(1, epochs // 24)


def _dense(run: Run, size: int, records: Path) -> Parts:
    return Parts()


def _prune(run: Run, size: int, records: Path) -> Parts:
    settings: dict[str, Any] = {"mode": "prune", "gate": run.option("gate", "soft"), "seed": run.seed}
    settings |= _target(run)
    if "steps" in dict(run.options):
        settings["prune_steps"] = run.option("steps")
    warmup, cooldown = stages(run.epochs)
    return Parts(callbacks=_callbacks(run, settings, warmup, cooldown))


def _partial(run: Run, size: int, records: Path) -> Parts:
    settings: dict[str, Any] = {"mode": "partial", "gate": run.option("gate", "soft"), "seed": run.seed}
    warmup, cooldown = stages(run.epochs)
    return Parts(callbacks=_callbacks(run, settings | _target(run), warmup, cooldown))


def _target(run: Run) -> dict[str, Any]:
    """Return the target of a run and what else it changes, as settings of the selection callback."""
    names = {"rate": "target_activation_rate", "coverage": "target_coverage", "significance": "significance"}
    names["weighting"] = "weighting"
    return {names[key]: value for key, value in run.options if key in names}


def _callbacks(run: Run, settings: dict[str, Any], warmup: int, cooldown: int) -> list[Callback]:
    schedule = TwoStageScheduler(
        warmup_epochs=int(run.option("warmup", warmup)), cooldown_epochs=int(run.option("cooldown", cooldown))
    )
    return [SparseSelectionCallback(**settings), schedule]


def _random(run: Run, size: int, records: Path) -> Parts:
    rates = json.loads((records / f"{source_of(run)}.json").read_text())["rate_by_epoch"]
    keeps = run.option("steps", "replan") == "keep"
    chooser = RandomShare(size, run.regime.batch_size, rates, keeps_steps=keeps, seed=run.seed)
    return Parts(ProgressModule, chooser=chooser)


def _infobatch(run: Run, size: int, records: Path) -> Parts:
    return Parts(ProgressModule, chooser=InfoBatch(size, run.epochs, run.seed))


def _seta(run: Run, size: int, records: Path) -> Parts:
    return Parts(ProgressModule, chooser=SeTa(size, run.epochs, run.seed))


def _orderdp(run: Run, size: int, records: Path) -> Parts:
    random_share = float(run.option("random", 0.75))
    top_share = float(run.option("top", 0.85))
    chooser = OrderDP(size, run.epochs, run.seed, random_share=random_share, top_share=top_share)
    return Parts(ProgressModule, chooser=chooser)


def _selective_backprop(run: Run, size: int, records: Path) -> Parts:
    return Parts(SelectiveBackpropModule)


POLICIES: dict[str, Callable[[Run, int, Path], Parts]] = {
    "dense": _dense,
    "prune": _prune,
    "partial": _partial,
    "random": _random,
    "infobatch": _infobatch,
    "seta": _seta,
    "orderdp": _orderdp,
    "selective-backprop": _selective_backprop,
}
"""Each takes the run, the samples of its data set and the folder of records."""


def source_of(run: Run) -> str | None:
    """Name the record that a run takes its rates from (option ``like``, a setting of the same regime and seed)."""
    like = run.option("like")
    return None if like is None else f"{run.regime.name}-{like}-s{run.seed}"


def parts_of(run: Run, size: int, records: Path) -> Parts:
    """Make what the policy of a run adds to the Trainer.

    Args:
        run: The run.
        size: The samples of its data set.
        records: The folder of the records.
    """
    if run.policy not in POLICIES:
        raise ValueError(f"expected a policy of {', '.join(POLICIES)}, got {run.policy!r}.")
    return POLICIES[run.policy](run, size, records)
