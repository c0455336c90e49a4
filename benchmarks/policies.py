"""The policies of the regime map: what is put into the Trainer for each, everything else being equal."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from regime_data import Chooser, RegimeData
from regime_ideas import (
    IDEAS,
    CountedAveragedScores,
    HigherRate,
    PartialInsideModule,
    ScaledGradient,
    SmallerSteps,
    changes,
)
from regime_networks import ClassifierModule, ProgressModule
from regime_run import Run
from rules import InfoBatch, OrderDP, RandomShare, SeTa, composer_probabilities, composer_selects
from torch import Tensor

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.recipes import curriculum

__all__ = ["POLICIES", "Parts", "check", "parts_of", "source_of", "stages"]


@dataclass
class Parts:
    """What a policy adds to an ordinary run.

    Attributes:
        module: The class of the module.
        callbacks: The callbacks of the Trainer.
        chooser: The rule that chooses the samples of each epoch, where it is none of ours.
        changes: Makes the context in which the fit runs.
    """

    module: type[ClassifierModule] = ClassifierModule
    callbacks: list[Callback] = field(default_factory=list)
    chooser: Chooser | None = None
    changes: Callable[[], AbstractContextManager[Any]] = nullcontext


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


def _dense(run: Run, data: RegimeData, records: Path) -> Parts:
    return Parts()


def _prune(run: Run, data: RegimeData, records: Path) -> Parts:
    settings: dict[str, Any] = {"mode": "prune", "gate": run.option("gate", "soft"), "seed": run.seed}
    settings |= _target(run)
    if "steps" in dict(run.options):
        settings["prune_steps"] = run.option("steps")
    warmup, cooldown = stages(run.epochs)
    idea = run.option("idea", "plain")
    if idea not in IDEAS:
        raise ValueError(f"expected an idea of {', '.join(IDEAS)}, got {idea!r}.")
    averaged = CountedAveragedScores()
    if idea == "averaged-model":
        settings["significance"] = averaged.score
    if idea == "partial-inside":  # the gradient has no rows of the samples that are left out inside
        settings["significance"] = "el2n"
    parts = Parts(callbacks=_callbacks(run, settings, warmup, cooldown))
    if idea == "averaged-model":
        parts.callbacks.append(averaged)
    elif idea == "higher-rate":
        selection = parts.callbacks[0]
        assert isinstance(selection, SparseSelectionCallback)
        parts.callbacks.append(HigherRate(selection, float(run.option("rate"))))
    elif idea == "smaller-steps":
        parts.callbacks.append(SmallerSteps())
    elif idea == "scaled-gradient":
        parts.callbacks.append(ScaledGradient())
    elif idea == "partial-inside":
        parts.module = PartialInsideModule
    parts.changes = functools.partial(changes, run, data)
    return parts


def _in_batch(run: Run, data: RegimeData, records: Path) -> Parts:
    """Select within each batch, in the mode that the policy is named after."""
    settings: dict[str, Any] = {"mode": run.policy, "gate": run.option("gate", "soft"), "seed": run.seed}
    warmup, cooldown = stages(run.epochs)
    return Parts(callbacks=_callbacks(run, settings | _target(run), warmup, cooldown))


def _target(run: Run) -> dict[str, Any]:
    """Return the target of a run and what else it changes, as settings of the selection callback."""
    names = {"rate": "target_activation_rate", "coverage": "target_coverage", "significance": "significance"}
    names |= {"weighting": "weighting", "trim": "trim"}
    settings = {names[key]: value for key, value in run.options if key in names}
    if settings.get("significance") in curriculum.__all__:
        settings["significance"] = getattr(curriculum, settings["significance"])
    return settings


def _callbacks(run: Run, settings: dict[str, Any], warmup: int, cooldown: int) -> list[Callback]:
    schedule = TwoStageScheduler(
        warmup_epochs=int(run.option("warmup", warmup)), cooldown_epochs=int(run.option("cooldown", cooldown))
    )
    return [SparseSelectionCallback(**settings), schedule]


def _random(run: Run, data: RegimeData, records: Path) -> Parts:
    rates = json.loads((records / f"{source_of(run)}.json").read_text())["rate_by_epoch"]
    steps = run.option("steps", "replan")
    if steps not in ("keep", "replan"):
        raise ValueError(f"expected steps 'keep' or 'replan' of a random share, got {steps!r}.")
    chooser = RandomShare(len(data.training), run.regime.batch_size, rates, keeps_steps=steps == "keep", seed=run.seed)
    return Parts(ProgressModule, chooser=chooser)


def _infobatch(run: Run, data: RegimeData, records: Path) -> Parts:
    return Parts(ProgressModule, chooser=InfoBatch(len(data.training), run.epochs, run.seed))


def _seta(run: Run, data: RegimeData, records: Path) -> Parts:
    return Parts(ProgressModule, chooser=SeTa(len(data.training), run.epochs, run.seed))


def _orderdp(run: Run, data: RegimeData, records: Path) -> Parts:
    random_share = float(run.option("random", 0.75))
    top_share = float(run.option("top", 0.85))
    chooser = OrderDP(len(data.training), run.epochs, run.seed, random_share=random_share, top_share=top_share)
    return Parts(ProgressModule, chooser=chooser)


def _selective_backprop(run: Run, data: RegimeData, records: Path) -> Parts:
    return Parts(SelectiveBackpropModule)


POLICIES: dict[str, Callable[[Run, RegimeData, Path], Parts]] = {
    "dense": _dense,
    "prune": _prune,
    "partial": _in_batch,
    "subset": _in_batch,
    "mask": _in_batch,
    "random": _random,
    "infobatch": _infobatch,
    "seta": _seta,
    "orderdp": _orderdp,
    "selective-backprop": _selective_backprop,
}
"""Each takes the run, its data and the folder of records."""


_TARGET = {"rate", "coverage", "gate", "significance", "weighting", "warmup", "cooldown"}
_OPTIONS: dict[str, set[str]] = {
    "prune": _TARGET | {"steps", "idea", "trim"},
    "partial": _TARGET | {"trim"},
    "subset": _TARGET,
    "mask": _TARGET,
    "random": {"like", "steps"},
    "orderdp": {"random", "top"},
    "original": {"rate"},
}
"""The options of each policy, besides those of every run that the Trainer does: ``length`` and ``lr``."""


def check(run: Run) -> None:
    """Refuse a run whose policy does not exist, or would ignore one of its options.

    Raises:
        ValueError: It is such a run.
    """
    known = [*POLICIES, "original"]
    if run.policy not in known:
        raise ValueError(f"expected a policy of {', '.join(known)}, got {run.policy!r}.")
    allowed = _OPTIONS.get(run.policy, set()) | (set() if run.policy == "original" else {"length", "lr"})
    if unknown := [name for name, _ in run.options if name not in allowed]:
        raise ValueError(f"expected options of {run.policy} among {sorted(allowed)}, got {unknown}.")


def source_of(run: Run) -> str | None:
    """Name the record that a run takes its rates from (option ``like``, a setting of the same regime and seed)."""
    like = run.option("like")
    return None if like is None else f"{run.regime.name}-{like}-s{run.seed}"


def parts_of(run: Run, data: RegimeData, records: Path) -> Parts:
    """Make what the policy of a run adds to the Trainer.

    Args:
        run: The run.
        data: Its data.
        records: The folder of the records.
    """
    return POLICIES[run.policy](run, data, records)
