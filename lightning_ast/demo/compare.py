"""Dense training, adaptive sparse training and a shortened dense run on the same model, schedule and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_ast.callbacks import SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.demo.data import DataName, ImageData
from lightning_ast.demo.models import ResNet9
from lightning_ast.errors import ConfigurationError
from lightning_ast.extras import needs
from lightning_ast.mode_facts import Mode
from lightning_ast.selection.setting_faults import setting_faults
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.words import counted

with needs("cli,vision", "rich"):
    from rich.console import Console, JustifyMethod
    from rich.table import Table

__all__ = ["RunResult", "equal_work_epochs", "run_demo"]


@dataclass(frozen=True)
class RunResult:
    """The results of one training run, and what it spent."""

    name: str
    accuracy: float  # of the test after the last epoch, in [0, 1]
    seconds: float  # of the epochs, validation included, as the summary of the run shows it
    epochs: int
    offered: int  # samples
    selected: int  # samples, that were trained on
    flops: float | None  # of forward and backward of training, scoring included


class _Settings(NamedTuple):
    epochs: int
    batch_size: int
    width: int
    channels: int
    lr: float


def _train(
    name: str, epochs: int, *callbacks: Callback, images: ImageData, settings: _Settings, seed: int
) -> RunResult:
    """Train a freshly made model once, and read the books that the selection callback keeps."""
    print(f"\n{name}: {counted(epochs, 'epoch')}")
    pl.seed_everything(seed, verbose=False)
    model = ResNet9(settings.channels, width=settings.width, lr=settings.lr)
    pl.seed_everything(seed, verbose=False)  # again: all runs see the batches in one order, whatever the weights drew
    monitor = SparseTrainingMonitor()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, monitor],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=images)
    ledger = next(each.ledger for each in callbacks if isinstance(each, SparseSelectionCallback))
    return RunResult(
        name=name,
        accuracy=float(trainer.callback_metrics["val_acc"]),
        seconds=monitor.seconds,
        epochs=epochs,
        offered=ledger.offered,
        selected=ledger.selected,
        flops=ledger.spent_flops(),
    )


def equal_work_epochs(epochs: int, flops: float | None, dense_flops: float | None) -> int | None:
    """Return how many epochs a dense run of the sparse run's FLOPs has; None where it is no shorter, or not known."""
    if not flops or not dense_flops:
        return None
    nearest = max(1, round(epochs * flops / dense_flops))
    return nearest if nearest < epochs else None


_COVERAGE = 0.97
_MOST_EPOCHS = 10_000
_MOST_WIDTH = 1024
_MOST_SEED = 2**32 - 1  # the largest that torch, numpy and Python all take
_SETTINGS: dict[DataName, _Settings] = {
    "digits": _Settings(epochs=16, batch_size=128, width=48, channels=1, lr=0.1),
    "fashion_mnist": _Settings(epochs=6, batch_size=256, width=8, channels=1, lr=0.2),
    "cifar10": _Settings(epochs=16, batch_size=256, width=64, channels=3, lr=0.2),
}


def run_demo(
    data: DataName = "digits",
    *,
    root: str = "data",
    mode: Mode = "partial",
    target_activation_rate: float | None = None,
    target_coverage: float | None = None,
    epochs: int | None = None,
    width: int | None = None,
    seed: int = 0,
    train_limit: int | None = None,
) -> list[RunResult]:
    """Train a ResNet-9 densely, then sparsely, then densely again for as many epochs as the sparse run's FLOPs buy.

    Print the results as a table, and return them; without the third where no shorter dense run has the same work. The
    arguments are the options of ``lightning-ast demo``; ``epochs`` and ``width`` have a default by data set.
    """
    if target_activation_rate is None and target_coverage is None:
        target_coverage = _COVERAGE
    sparse = SparseSelectionCallback(
        target_activation_rate=target_activation_rate, target_coverage=target_coverage, mode=mode, seed=seed
    )
    settings = _SETTINGS[data]
    if data == "cifar10" and not torch.cuda.is_available():  # a CPU would take many times as long
        settings = settings._replace(epochs=6, width=16)
    epochs = settings.epochs if epochs is None else epochs
    settings = settings if width is None else settings._replace(width=width)
    batch_size = settings.batch_size
    faults = list(setting_faults(SelectionSettings.of(sparse)))
    faults += _range_faults("epochs", epochs, 3 if mode == "prune" else 1, _MOST_EPOCHS)
    faults += _range_faults("width", settings.width, 1, _MOST_WIDTH) + _range_faults("seed", seed, 0, _MOST_SEED)
    if faults := faults + _range_faults("train_limit", train_limit, batch_size, None):
        raise ConfigurationError(faults)  # before the dense run, not after it
    images = ImageData(data, root=root, batch_size=batch_size, train_limit=train_limit)
    images.setup("fit")

    run = partial(_train, images=images, settings=settings, seed=seed)
    schedule = TwoStageScheduler(warmup_epochs=0.1, cooldown_epochs=0.1)
    target = f"coverage {target_coverage}" if target_activation_rate is None else f"r = {target_activation_rate:g}"
    results = [run("dense", epochs, _keeping_books()), run(f"AST, {mode}, {target}", epochs, sparse, schedule)]
    shortened = equal_work_epochs(epochs, results[1].flops, results[0].flops)
    if shortened is not None:
        results.append(run("dense, shortened", shortened, _keeping_books()))
    print_table(results, f"{data}, ResNet-9 of width {settings.width}, seed {seed}")
    return results


def _keeping_books() -> SparseSelectionCallback:
    """Make a callback that counts what a dense run does, and is bitwise the plain run."""
    return SparseSelectionCallback(target_activation_rate=1.0)


def _range_faults(name: str, value: int | None, least: int, most: int | None) -> list[str]:
    """Tell what is wrong with a whole number that must be in a range, the ends included, where it is given."""
    if value is None:
        return []
    if isinstance(value, int) and least <= value and (most is None or value <= most):
        return []
    wanted = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
    return [f"{name}: expected {wanted}, got {value!r}."]


def print_table(results: list[RunResult], title: str) -> None:
    """Print the comparison: every saving is named by what was saved, against the first run."""
    threads = counted(torch.get_num_threads(), "thread")
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads}"
    table = Table(title=f"{title}, {hardware}")
    first = results[0]
    columns: dict[str, Callable[[RunResult], str]] = {
        "run": lambda run: run.name,
        "epochs": lambda run: str(run.epochs),
        "accuracy": lambda run: f"{run.accuracy:.2%}",
        "seconds": lambda run: f"{run.seconds:.1f}",
        "samples": lambda run: f"{run.selected:,}",
        "GFLOPs": lambda run: "-" if run.flops is None else f"{run.flops / 1e9:,.0f}",
        "activation": lambda run: f"{run.selected / run.offered:.1%}",
        "samples skipped": lambda run: _saved(run.selected, first.selected),
        "FLOPs saved": lambda run: _saved(run.flops, first.flops),
        "seconds saved": lambda run: _saved(run.seconds, first.seconds),
    }
    for name in columns:
        justify: JustifyMethod = "left" if name == "run" else "right"
        table.add_column(name, justify=justify, no_wrap=name == "run", min_width=max(map(len, name.split())))
    for result in results:
        table.add_row(*(cell(result) for cell in columns.values()))
    console = Console(width=max(124, Console().width))
    console.print()
    console.print(table)
    console.print(
        "seconds: of the epochs, validation included. samples: those trained on. GFLOPs: forward, backward and\n"
        "scoring, counted. Savings: against the dense run; samples skipped are not compute saved."
    )
    if len(results) > 2:
        console.print("The shortened dense run is the baseline to beat: the sparse run's work, to the nearest epoch.")


def _saved(value: float | None, of: float | None) -> str:
    return "-" if value is None or not of else f"{1 - value / of:.1%}"
