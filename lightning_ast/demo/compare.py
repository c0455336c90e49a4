"""Dense training, adaptive sparse training and a shortened dense run on the same model, schedule and seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_ast.callbacks import SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.core.ledger import Ledger
from lightning_ast.demo.data import DataName, ImageData
from lightning_ast.demo.models import ResNet9
from lightning_ast.errors import ConfigurationError
from lightning_ast.mode_facts import Mode
from lightning_ast.selection.setting_faults import setting_faults
from lightning_ast.selection.settings import SelectionSettings
from lightning_ast.words import aligned, counted

__all__ = ["RunResult", "counting", "equal_work_epochs", "run_demo"]


class RunResult(NamedTuple):
    """The results of one training run, and what it spent."""

    name: str
    epochs: int
    accuracy: float  # of the test after the last epoch, in [0, 1]
    seconds: float  # of the epochs, validation included, as the summary of the run shows it
    ledger: Ledger

    @property
    def flops(self) -> float | None:
        """Return the FLOPs of forward and backward of training, scoring included."""
        return self.ledger.spent_flops()


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
    return RunResult(name, epochs, float(trainer.callback_metrics["val_acc"]), monitor.seconds, ledger)


def equal_work_epochs(epochs: int, flops: float | None, dense_flops: float | None) -> int | None:
    """Return how many epochs a dense run of the sparse run's FLOPs has; None where it is no shorter, or not known."""
    if not flops or not dense_flops:
        return None
    nearest = max(1, round(epochs * flops / dense_flops))
    return nearest if nearest < epochs else None


def counting() -> SparseSelectionCallback:
    """Return a callback that counts the FLOPs of a dense run, and is bitwise the plain run."""
    return SparseSelectionCallback(target_activation_rate=1.0)


_COVERAGE = 0.97
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
    ranges = {
        "epochs": (epochs, 3 if mode == "prune" else 1, 10_000),
        "width": (settings.width, 1, 1024),
        "seed": (seed, 0, 2**32 - 1),  # the largest that torch, numpy and Python all take
        "train_limit": (train_limit, settings.batch_size, math.inf),
    }
    if faults := [*setting_faults(SelectionSettings.of(sparse)), *_range_faults(ranges)]:
        raise ConfigurationError(faults)  # before the dense run, not after it
    images = ImageData(data, root=root, batch_size=settings.batch_size, train_limit=train_limit)
    images.setup("fit")
    run = partial(_train, images=images, settings=settings, seed=seed)
    schedule = TwoStageScheduler(warmup_epochs=0.1, cooldown_epochs=0.1)
    target = f"coverage {target_coverage}" if target_activation_rate is None else f"r = {target_activation_rate:g}"
    results = [run("dense", epochs, counting()), run(f"AST, {mode}, {target}", epochs, sparse, schedule)]
    if (shortened := equal_work_epochs(epochs, results[1].flops, results[0].flops)) is not None:
        results.append(run("dense, shortened", shortened, counting()))
    print_table(results, f"{data}, ResNet-9 of width {settings.width}, seed {seed}")
    return results


def _range_faults(ranges: dict[str, tuple[int | None, int, float]]) -> list[str]:
    """Tell which numbers are not whole, or out of their range, the ends included; None was not given."""
    faults = []
    for name, (value, least, most) in ranges.items():
        if value is not None and not (isinstance(value, int) and least <= value <= most):
            wanted = f"of at least {least}" if math.isinf(most) else f"from {least} to {most}"
            faults.append(f"{name}: expected an int {wanted}, got {value!r}.")
    return faults


def print_table(results: list[RunResult], title: str) -> None:
    """Print the comparison: every saving is named by what was saved, against the first run."""
    threads = counted(torch.get_num_threads(), "thread")
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads}"
    first = results[0]
    columns: dict[str, Callable[[RunResult], str]] = {
        "run": lambda run: run.name,
        "epochs": lambda run: str(run.epochs),
        "accuracy": lambda run: f"{run.accuracy:.2%}",
        "seconds": lambda run: f"{run.seconds:.1f}",
        "samples": lambda run: f"{run.ledger.selected:,}",
        "GFLOPs": lambda run: "-" if run.flops is None else f"{run.flops / 1e9:,.0f}",
        "activation": lambda run: f"{run.ledger.activation_rate:.1%}",
        "skipped": lambda run: _saved(run.ledger.selected, first.ledger.selected),
        "FLOPs saved": lambda run: _saved(run.flops, first.flops),
        "seconds saved": lambda run: _saved(run.seconds, first.seconds),
    }
    rows = [tuple(cell(result) for cell in columns.values()) for result in results]
    print(f"\n{title}, {hardware}\n\n{aligned([tuple(columns), *rows])}\n")
    print(
        "seconds: of the epochs, validation included. samples: those trained on. GFLOPs: forward, backward and\n"
        "scoring, counted. Savings: against the dense run; samples skipped are not compute saved."
    )
    if len(results) > 2:
        print("The shortened dense run is the baseline to beat: the sparse run's work, to the nearest epoch.")


def _saved(value: float | None, of: float | None) -> str:
    return "-" if value is None or not of else f"{1 - value / of:.1%}"
