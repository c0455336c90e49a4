"""Dense training, adaptive sparse training and a shortened dense run on the same model, schedule and seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Timer
from rich.console import Console
from rich.table import Table

from lightning_ast.callbacks import SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.callbacks._faults import ConfigurationError, setting_faults
from lightning_ast.core.execution import Mode
from lightning_ast.core.ledger import Ledger
from lightning_ast.demo.data import DataName, ImageData
from lightning_ast.demo.models import ImageClassifier, ResNet9
from lightning_ast.words import counted

__all__ = ["RunResult", "run_demo", "train"]


@dataclass(frozen=True)
class RunResult:
    """What one training run reached and spent.

    Attributes:
        name: of the run.
        accuracy: test accuracy after the last epoch, in [0, 1].
        seconds: wall time of training, validation excluded.
        epochs: epochs trained.
        offered: samples offered.
        selected: samples trained on.
        flops: FLOPs spent on forward and backward of training (scoring included), or None.
    """

    name: str
    accuracy: float
    seconds: float
    epochs: int
    offered: int
    selected: int
    flops: float | None


def train(
    name: str,
    model: ImageClassifier,
    data: ImageData,
    *,
    max_epochs: int,
    seed: int,
    callbacks: list[Callback],
    trainer_options: dict[str, Any] | None = None,
) -> RunResult:
    """Train once and read the books.

    Args:
        name: of the run, for the table.
        model: freshly made.
        data: the images.
        max_epochs: epochs to train.
        seed: of everything but the initial weights (which the caller has drawn).
        callbacks: one of them a :class:`SparseSelectionCallback`; a dense run has one with target 1, which is bitwise
            the plain run and keeps the books.
        trainer_options: further arguments of the Trainer.
    """
    pl.seed_everything(seed, verbose=False)
    timer = Timer()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options.update(trainer_options or {})
    trainer = pl.Trainer(
        max_epochs=max_epochs, callbacks=[*callbacks, SparseTrainingMonitor(), timer], num_sanity_val_steps=0, **options
    )
    trainer.fit(model, datamodule=data)
    ledger: Ledger = next(c.ledger for c in callbacks if isinstance(c, SparseSelectionCallback))
    return RunResult(
        name=name,
        accuracy=float(trainer.callback_metrics["val_acc"]),
        seconds=timer.time_elapsed("train") - timer.time_elapsed("validate"),
        epochs=max_epochs,
        offered=ledger.offered,
        selected=ledger.selected,
        flops=ledger.spent_flops(),
    )


_SETTINGS: dict[DataName, dict[str, Any]] = {
    "digits": {"epochs": 16, "batch_size": 128, "width": 48, "channels": 1, "lr": 0.1},
    "fashion_mnist": {"epochs": 6, "batch_size": 256, "width": 8, "channels": 1, "lr": 0.2},
    "cifar10": {"epochs": 16, "batch_size": 256, "width": 64, "channels": 3, "lr": 0.2},
}


def run_demo(
    data: DataName = "digits",
    *,
    root: str = "data",
    mode: Mode = "partial",
    target_activation_rate: float = 0.4,
    epochs: int | None = None,
    width: int | None = None,
    seed: int = 0,
    train_limit: int | None = None,
) -> list[RunResult]:
    """Train a ResNet-9 densely, then sparsely, then densely again for as many epochs as the sparse run's FLOPs buy.

    The defaults for ``cifar10`` are 16 epochs of full width on a GPU, 6 of a quarter of it on a CPU.

    Args:
        data: ``"digits"``, ``"fashion_mnist"`` or ``"cifar10"``.
        root: where the images are, or are downloaded to.
        mode: how sparse steps are executed.
        target_activation_rate: in (0, 1].
        epochs: length of the runs; None takes a default for the data.
        width: channels of the first layer; None takes a default for the data.
        seed: of the weights, the order of the samples and the gate.
        train_limit: use only the first so many training images.

    Returns:
        The results, after printing them as a table; without the third where the sparse run saves less than an epoch.

    Raises:
        ConfigurationError: the rate or the mode cannot be.
        DataNotFoundError: the images are not there and cannot be downloaded.
    """
    sparse = SparseSelectionCallback(target_activation_rate=target_activation_rate, mode=mode, seed=seed)
    if faults := setting_faults(sparse):  # said before the dense run, not after it
        raise ConfigurationError(faults)
    settings = dict(_SETTINGS[data])
    if data == "cifar10" and not torch.cuda.is_available():
        settings.update(epochs=6, width=16)
    epochs = settings["epochs"] if epochs is None else epochs
    images = ImageData(data, root=root, batch_size=settings["batch_size"], train_limit=train_limit)
    images.setup("fit")

    def fresh() -> ImageClassifier:
        pl.seed_everything(seed, verbose=False)
        return ResNet9(settings["channels"], width=width or settings["width"], lr=settings["lr"])

    def run(name: str, length: int, *callbacks: Callback) -> RunResult:
        print(f"\n{name}: {counted(length, 'epoch')}")
        return train(name, fresh(), images, max_epochs=length, seed=seed, callbacks=list(callbacks))

    schedule = TwoStageScheduler(warmup_epochs=0.1, cooldown_epochs=0.1)
    full = run("dense", epochs, SparseSelectionCallback(target_activation_rate=1.0))
    ast = run(f"AST, {mode}, r = {target_activation_rate:g}", epochs, sparse, schedule)
    results = [full, ast]
    affordable = math.ceil(epochs * ast.flops / full.flops) if full.flops and ast.flops else epochs
    if affordable < epochs:
        results.append(run("dense, shortened", affordable, SparseSelectionCallback(target_activation_rate=1.0)))
    print_table(results, f"{data}, ResNet-9 of width {width or settings['width']}, seed {seed}")
    return results


def print_table(results: list[RunResult], title: str) -> None:
    """The comparison: every saving is named by what was saved, against the first run."""
    threads = counted(torch.get_num_threads(), "thread")
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads}"
    table = Table(title=f"{title}, {hardware}")
    columns = (
        "run",
        "epochs",
        "accuracy",
        "seconds",
        "samples",
        "GFLOPs",
        "activation",
        "saved: samples",
        "FLOPs",
        "seconds",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column == "run")
    reference = results[0]
    for result in results:
        table.add_row(
            result.name,
            str(result.epochs),
            f"{result.accuracy:.2%}",
            f"{result.seconds:.1f}",
            f"{result.selected:,}",
            f"{result.flops / 1e9:,.0f}" if result.flops is not None else "-",
            f"{result.selected / result.offered:.1%}",
            f"{1 - result.selected / reference.selected:.1%}",
            f"{1 - result.flops / reference.flops:.1%}" if result.flops is not None and reference.flops else "-",
            f"{1 - result.seconds / reference.seconds:.1%}",
        )
    console = Console(width=max(120, Console().width))
    console.print()
    console.print(table)
    console.print(
        "samples: those trained on. GFLOPs: forward, backward and scoring, counted. Savings: against the dense run;\n"
        "samples skipped are not compute saved. The shortened dense run has the sparse run's FLOPs, rounded up to an\n"
        "epoch: it is the baseline to beat."
    )
