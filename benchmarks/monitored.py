"""Fashion-MNIST with every monitor on: what the event file holds, and what watching costs.

    python benchmarks/monitored.py --logs logs   # then: lightning-ast report logs

A dense run, and one in each of two modes at the recommended coverage, with SparseTrainingMonitor, EnergyMonitor,
ThroughputMonitor and TensorBoard. What the two monitors of this package do is timed from outside, hook by hook, the
timing included; not timed is that an index is noted as it is drawn.
The record says what share of the training that is, what the pictures at the end take besides, and names every series
that was read back from the event files.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from record import QUIET, RECORDS, kind, provenance, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_ast import EnergyMonitor, SparseSelectionCallback, SparseTrainingMonitor, TwoStageScheduler
from lightning_ast.demo import ImageData, ResNet9
from lightning_ast.energy.epoch_costs import OpenEpoch
from lightning_ast.monitoring.samples import SampleWatcher

STEP = ("on_train_batch_start", "on_train_batch_end", "on_after_backward", "finish_batch", "indices")
EPOCH = ("on_train_epoch_start", "on_train_epoch_end", "on_validation_start", "on_validation_end", "start_stage")


class Watch:
    """A timer that adds up what hooks take; one within another is counted once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def time(self, owner: type, name: str, group: str) -> None:
        """Time every call of a method."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside = True
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[group] = self.seconds.get(group, 0.0) + time.perf_counter() - began
                self._inside = False

        setattr(owner, name, timed)

    def everything(self) -> None:
        """Time all that the monitors are told of."""
        for owner in (SparseTrainingMonitor, EnergyMonitor, OpenEpoch, SampleWatcher):
            for group, names in (("step", STEP), ("epoch", EPOCH), ("end", ("on_train_end",))):
                for name in names:
                    if name in vars(owner):
                        self.time(owner, name, group)


def series(folder: Path) -> dict[str, list[str]]:
    """List the names of what an event file holds, by kind."""
    read = EventAccumulator(str(folder))
    read.Reload()
    tags = read.Tags()
    return {name: sorted(tags[name]) for name in ("scalars", "histograms", "images", "tensors")}


def run(mode: str, options: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """Train once with all monitors, and return what watching took."""
    pl.seed_everything(options.seed, verbose=False)
    selection = SparseSelectionCallback(
        mode="partial" if mode == "dense" else mode,  # type: ignore[arg-type]
        target_coverage=options.coverage,
        prune_steps="follow" if mode == "prune" else None,
    )
    energy = EnergyMonitor()
    monitor = SparseTrainingMonitor()
    throughput = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[1]), window_size=20)
    schedule = TwoStageScheduler(warmup_epochs=0.1, cooldown_epochs=0.125)
    logger = TensorBoardLogger(str(options.logs), name=mode, version="")
    ours: list[Callback] = [throughput, energy, monitor]
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=ours if mode == "dense" else [*ours, selection, schedule],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        **{**QUIET, "logger": logger},
    )
    data = ImageData("fashion_mnist", options.root, batch_size=options.batch_size, train_limit=options.train_limit)
    watch.seconds.clear()
    trainer.fit(ResNet9(1, width=options.width), datamodule=data)
    training = energy.seconds
    return {
        "mode": mode,
        "accuracy": round(float(trainer.callback_metrics["val_acc"]), 4),
        "steps": trainer.global_step,
        "seconds": round(training, 2),
        "joules": energy.joules,
        "savings": None if mode == "dense" else selection.savings,
        "watching_share_of_steps": round(watch.seconds["step"] / training, 5),
        "watching_share": round((watch.seconds["step"] + watch.seconds["epoch"]) / training, 5),
        "milliseconds_a_step": round(1e3 * watch.seconds["step"] / trainer.global_step, 4),
        "pictures_at_the_end_seconds": round(watch.seconds["end"], 2),
        "series": series(Path(logger.log_dir)),
    }


def main() -> None:
    """Train, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--width", type=int, default=8 if not torch.cuda.is_available() else 64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-limit", type=int, default=20_000 if not torch.cuda.is_available() else 60_000)
    parser.add_argument("--coverage", type=float, default=0.97)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", default="dense,partial,prune")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    watch = Watch()
    watch.everything()
    runs = []
    for mode in options.modes.split(","):
        runs.append(run(mode, options, watch))
        print({name: value for name, value in runs[-1].items() if name != "series"}, flush=True)
    names = ("epochs", "width", "batch_size", "train_limit", "coverage", "seed")
    settings = {name: getattr(options, name) for name in names}
    record = {"benchmark": "monitored", "model": "ResNet-9", **settings, "runs": runs, **provenance()}
    save(record, f"monitored-{kind()}", folder=options.out, indent=1)


if __name__ == "__main__":
    main()
