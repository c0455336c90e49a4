"""Train one run of the regime map through Lightning, and make its record."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from policies import Parts, parts_of
from record import QUIET
from regime_data import RegimeData
from regime_networks import NETWORKS, ClassifierModule, flops_of_sample
from regime_run import Run

from lightning_ast import SparseSelectionCallback

__all__ = ["default_precision", "train", "validated_every"]


def default_precision() -> str:
    """Return bf16 where the machine computes in it: on a GPU, or on a CPU with instructions for it."""
    if torch.cuda.is_available():
        return "bf16-mixed"
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.is_file() else []
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def validated_every(epochs: int) -> int:
    """Return the epochs between two validations: about ten in a run, the last one at its end."""
    most = max(1, epochs // 8)
    return max(every for every in range(1, most + 1) if epochs % every == 0)


class Stopwatch(Callback):
    """The wall time and the time on the CPU that training took, without validation."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        """Go on."""
        self._since = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        """Pause."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since[0]
            self.cpu_seconds += time.process_time() - self._since[1]
            self._since = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop()


class Trace(Callback):
    """What happened in each epoch.

    Args:
        data: The data of the run.
        selection: The selection callback, or None.
    """

    def __init__(self, data: RegimeData, selection: SparseSelectionCallback | None) -> None:
        self._data = data
        self._selection = selection
        self._dense_samples = data.dense_batches * data.regime.batch_size
        self._trained = 0
        self._wrong = 0
        self._selected_before = 0
        self._coverages: list[float] = []
        self.accuracies: list[float] = []
        self.rates: list[float] = []
        self.coverages: list[float | None] = []
        self.wrong_shares: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        indices = batch[2].cpu()
        kept = None
        if self._selection is not None:
            if self._selection.mode != "prune":
                kept = self._selection.last_selection
            coverage = trainer.callback_metrics.get("ast/coverage")
            if coverage is not None and self._selection.stage == "sparse":
                self._coverages.append(float(coverage))
        if kept is not None:
            indices = indices[kept.indices.cpu()]
        self._trained += len(indices)
        self._wrong += int(self._data.training.wrong[indices % len(self._data.training.wrong)].sum())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = self._trained
        if self._selection is not None:
            trained = self._selection.ledger.selected - self._selected_before
            self._selected_before = self._selection.ledger.selected
        elif isinstance(pl_module, ClassifierModule):
            trained = pl_module.backwarded - self._selected_before
            self._selected_before = pl_module.backwarded
        self.rates.append(round(trained / self._dense_samples, 4))
        mean = sum(self._coverages) / len(self._coverages) if self._coverages else None
        self.coverages.append(None if mean is None else round(mean, 4))
        self.wrong_shares.append(round(self._wrong / max(1, self._trained), 4))
        self._trained = 0
        self._wrong = 0
        self._coverages = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.accuracies.append(round(float(trainer.callback_metrics["val_acc"]), 4))


def train(run: Run, *, root: str, records: Path, precision: str, tiny: bool = False) -> dict[str, Any]:
    """Train once.

    Args:
        run: The run.
        root: Where the images are looked for.
        records: The folder of the records, for runs that take the rates of another.
        precision: The precision of the Trainer.
        tiny: Whether only two batches of each epoch are trained on, for tests.

    Returns:
        The record, without what it says of machine and code.
    """
    facts = NETWORKS[run.regime.network]
    data = RegimeData(run.regime, run.seed, root)
    parts = parts_of(run, len(data.training), records)
    data.chooser = parts.chooser
    flops = flops_of_sample(facts.make(*data.shape, run.regime.width), *data.shape)
    pl.seed_everything(run.seed, verbose=False)
    lr = run.option("lr")
    module = parts.module(facts.make(*data.shape, run.regime.width), facts, None if lr is None else float(lr))
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    selection = next((each for each in parts.callbacks if isinstance(each, SparseSelectionCallback)), None)
    trace = Trace(data, selection)
    watch = Stopwatch()
    trainer = _trainer(run, parts, precision, [watch, trace], tiny=tiny)
    pl.seed_everything(run.seed, verbose=False)
    trainer.fit(module, datamodule=data)
    forwarded = float(module.forwarded)
    backwarded = float(module.backwarded)
    if selection is not None:
        totals = selection.ledger.stages.values()
        forwarded = sum(each.forwarded for each in totals)
        backwarded = sum(each.backwarded for each in totals)
    spent = forwarded * flops[0] + backwarded * flops[1]
    return {
        "benchmark": "regimes",
        "name": run.name,
        **run.facts(),
        "accuracy": trace.accuracies[-1],
        "best_accuracy": max(trace.accuracies),
        "accuracy_by_validation": trace.accuracies,
        "validated_every_epochs": validated_every(run.epochs),
        "train_accuracy": round(_train_accuracy(module, data), 4),
        "work_epochs": round(spent / sum(flops) / (data.dense_batches * run.regime.batch_size), 3),
        "flops": spent,
        "flops_per_sample": {"forward": flops[0], "backward": flops[1]},
        "samples_forwarded": forwarded,
        "samples_backwarded": round(backwarded, 1),
        "optimizer_steps": trainer.global_step,
        "train_samples": len(data.training),
        "rate_by_epoch": trace.rates,
        "coverage_by_epoch": trace.coverages if any(each is not None for each in trace.coverages) else None,
        "wrong_label_share_by_epoch": trace.wrong_shares if run.regime.noise else None,
        "seconds": round(watch.seconds, 2),
        "cpu_seconds": round(watch.cpu_seconds, 2),
        "lr": module.lr,
        "precision": f"{trainer.precision}, channels_last",
    }


def _trainer(run: Run, parts: Parts, precision: str, watchers: list[Callback], *, tiny: bool) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=run.epochs,
        precision=precision,  # type: ignore[arg-type]
        callbacks=[*parts.callbacks, *watchers],
        check_val_every_n_epoch=validated_every(run.epochs),
        reload_dataloaders_every_n_epochs=int(parts.chooser is not None),
        limit_val_batches=1 if tiny else None,
        num_sanity_val_steps=0,
        **QUIET,
    )


@torch.no_grad()
def _train_accuracy(module: ClassifierModule, data: RegimeData) -> float:
    """Return the accuracy on up to 5,000 training images without augmentation, against their true or wrong labels."""
    module.eval()
    right = 0
    images = data.training.images[:5_000]
    for rows in torch.arange(len(images)).split(500):
        pixels = data.pixels(images[rows], augment=False).to(module.device)
        right += int((module(pixels).argmax(1).cpu() == data.training.labels[rows]).sum())
    return right / len(images)
