"""Time of a warmup step with the callback, as a share of the same step without it: "off" must cost nothing.

    python benchmarks/warmup_time.py --root cifar10.npz

One run a mode, all of it warmup, in which every second step goes without the callback's hooks: neighbours are compared,
so that what else the machine does falls on both. Median of the steps with them over median of the steps without, for
each epoch; the median of the epochs. What a logged step (every 50th) takes besides is given apart. One record.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from record import QUIET, RECORDS, kind, provenance, save
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.callbacks import sparse_selection
from lightning_ast.demo import ResNet9
from lightning_ast.demo.data import load_images

MODES = ("mask", "subset", "partial", "prune")


class EverySecond(SparseSelectionCallback):
    """The hooks of a batch are called for batches of even index alone; others find the step as it was."""

    _on = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._on = batch_idx % 2 == 0
        if self._on:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, *hook: Any) -> None:
        if self._on:
            super().on_before_backward(*hook)

    def on_after_backward(self, *hook: Any) -> None:
        if self._on:
            super().on_after_backward(*hook)

    def on_before_optimizer_step(self, *hook: Any) -> None:
        if self._on:
            super().on_before_optimizer_step(*hook)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._on or self.mode == "prune":  # which counts batches
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class StepTimes(pl.Callback):
    """Seconds of each step, from the end of the one before: by epoch, even ones apart from odd ones."""

    def __init__(self) -> None:
        self.seconds: list[tuple[list[float], list[float]]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._last: float | None = None
        self.seconds.append(([], []))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds[-1][batch_idx % 2].append(now - self._last)
        self._last = now


class StopAfter(pl.Callback):
    """A callback that ends the run after so many epochs of a longer plan."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def measure(mode: str, data: DataLoader[Any], width: int, epochs: int, folder: str) -> tuple[list[float], float]:
    """Return the shares of the epochs but the first, and the median plain step in seconds."""
    pl.seed_everything(0, verbose=False)
    times = StepTimes()
    schedule = TwoStageScheduler(warmup_epochs=epochs + 1)
    trainer = pl.Trainer(
        max_epochs=epochs + 2,
        callbacks=[EverySecond(mode=mode), schedule, StopAfter(epochs), times],  # type: ignore[arg-type]
        **{**QUIET, "logger": CSVLogger(folder)},
    )
    trainer.fit(ResNet9(3, width=width), data)
    medians = [(statistics.median(on), statistics.median(off)) for on, off in times.seconds[1:]]
    return [on / off for on, off in medians], statistics.median(off for _, off in medians)


def main() -> None:
    """Measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--sizes", default="8x32,8x64", help="width x batch size, comma-separated")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load_images("cifar10", options.root)
    logged: list[float] = []
    log_step = sparse_selection.log_step

    def timed(*arguments: Any) -> None:
        begin = time.perf_counter()
        log_step(*arguments)
        logged.append(time.perf_counter() - begin)

    sparse_selection.log_step = timed
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            width, batch = map(int, size.split("x"))
            count = options.steps * batch
            x = images.train_images[:count].float() / 255
            y = images.train_labels[:count]
            data = DataLoader(TensorDataset(x, y), batch_size=batch)
            found = {mode: measure(mode, data, width, options.epochs, folder) for mode in MODES}
            row = {
                "width": width,
                "batch_size": batch,
                "plain_seconds": statistics.median(seconds for _, seconds in found.values()),
                "share": {mode: statistics.median(shares) for mode, (shares, _) in found.items()},
                "shares": {mode: shares for mode, (shares, _) in found.items()},
            }
            print({k: v for k, v in row.items() if k != "shares"})
            rows.append(row)
    record = {
        "benchmark": "warmup-time",
        "rows": rows,
        "log_seconds": statistics.median(logged),
        "log_every_steps": 50,
        **provenance(),
    }
    print(save(record, f"warmup-time-{kind()}", folder=options.out))


if __name__ == "__main__":
    main()
