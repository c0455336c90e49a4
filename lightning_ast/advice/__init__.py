"""``advise``: what sparse training would save on your own model, data and machine, measured before you train."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_ast.advice.measure import Measurement
from lightning_ast.advice.measured import CoverageFacts, Facts
from lightning_ast.advice.predict import Prediction
from lightning_ast.advice.report import Advice, render
from lightning_ast.advice.verdict import Verdict
from lightning_ast.errors import AdviceError

__all__ = ["Advice", "AdviceError", "CoverageFacts", "Facts", "Prediction", "Verdict", "advise", "render"]


def advise(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: Any = None,
    *,
    val_data: Any = None,
    budget_seconds: float = 45.0,
) -> Advice:
    """Measure the loader, a training step in every mode and a validation; predict step, memory and whole run.

    It runs on copies of the Trainer, the module and the loaders, which stay bitwise as they are, as does the global
    random state. Only what the data keeps for itself is shared and not put back: map-style datasets, the attributes of
    a datamodule, samplers that count or draw from something other than torch's generators. The Trainer's callbacks and
    loggers do not run, so what they cost is not in the figures; a :class:`~lightning_ast.SparseSelectionCallback` and a
    :class:`~lightning_ast.TwoStageScheduler` among them tell which mode, rate or coverage, and stages are meant.

    The samples of up to 8 batches are scored. From these scores follow the activation rates that the coverages 0.9,
    0.95, 0.97, 0.99 and the callback's own ``target_coverage`` need. A module that has learned little needs nearly all
    samples; the rate falls as it learns. Pass the module of a trained checkpoint for a look at later epochs.

    What a mode does to accuracy is not measured; nor are the first steps of a run, ``max_time``, or callbacks that
    train differently (fine-tuning schedules, weight averaging). Loading with workers and training are taken to run side
    by side, which holds where they do not share the same cores.

    Args:
        trainer: The Trainer as for the run; one process (``devices=1``).
        module: The module as for the run.
        data: The training data as ``trainer.fit`` takes it: a LightningDataModule, a loader, a collection of loaders,
            or None for the module's own.
        val_data: The validation loaders where ``data`` is no datamodule.
        budget_seconds: The time for all of it. Two rounds are measured in any case; the report says where that took
            longer.

    Returns:
        The advice; ``print`` it, or :func:`render` it.

    Raises:
        AdviceError: Nothing can be measured here; the message tells what to change.
        ConfigurationError: A setting of the Trainer's selection callback or schedule cannot be used.

    Example:
        >>> from lightning_ast.demo import ImageData, ResNet9
        >>> trainer = pl.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> advice = advise(trainer, ResNet9(in_channels=1, width=4), ImageData("digits"), budget_seconds=2)
        >>> advice.at("prune", 0.4).run_seconds < advice.dense.run_seconds
        True
        >>> advice.facts.coverage.rates[0.9] > 0.7  # it has learned nothing yet
        True
    """
    if not budget_seconds > 0:  # not a number, too
        raise AdviceError(f"budget_seconds: expected a number of seconds above 0, got {budget_seconds!r}.")
    return Advice(Measurement(trainer, module, data, val_data, budget_seconds=budget_seconds).facts())
