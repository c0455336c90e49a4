"""Time that the callback adds to small training steps, and to a run of few steps.

    python benchmarks/overhead.py                # the step of a three-layer MLP, every mode
    python benchmarks/overhead.py --short-run    # a whole fit of 24 steps of a small convolutional network

Each step's time is that between the ends of two batches, so the callback, Lightning's loop and the loading are all in
it. Every round runs every variant once, in rotated order, with Python's garbage collection off; a variant is compared
with the run without the callback of the same round. The first steps of a variant are left out, and so is the whole
first round of `--short-run`. Writes one record.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from record import QUIET, RECORDS, kind, on_gpu, provenance, save, silence_lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo.data import load_images

Stage = Literal["warmup", "sparse"]
Seconds = dict[str, list[Any]]


@dataclass(frozen=True)
class Variant:
    """One way to train: a mode of the callback in one stage, or no callback at all."""

    name: str
    mode: str | None = None
    stage: Stage = "sparse"

    @property
    def has_warmup(self) -> bool:
        """Tell whether the run begins with a dense epoch: to be measured, or for `prune` to remember scores."""
        return self.stage == "warmup" or self.mode == "prune"

    def callbacks(self, rate: float) -> list[Callback]:
        """Make the callbacks of a fresh run."""
        if self.mode is None:
            return []
        selection = SparseSelectionCallback(mode=self.mode, target_activation_rate=rate)  # type: ignore[arg-type]
        return [selection, TwoStageScheduler(warmup_epochs=1)] if self.has_warmup else [selection]


NETWORKS = {"width": 480, "channels": 32, "pixels": 32, "short_steps": 24}
TINY = {"width": 8, "channels": 8, "pixels": 8, "short_steps": 3, "rounds": 1, "steps": 8, "skip": 2, "batch_size": 32}
"""The options of `--tiny`."""

PLAIN = "plain"
VARIANTS = (
    Variant(PLAIN),
    Variant("warmup", "partial", "warmup"),
    Variant("warmup of prune", "prune", "warmup"),
    Variant("mask", "mask"),
    Variant("partial", "partial"),
    Variant("subset", "subset"),
    Variant("prune", "prune"),
)


class Classifier(pl.LightningModule):
    """Cross-entropy and SGD, and nothing that would take time of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def mlp(width: int) -> nn.Module:
    """Three linear layers for 64 pixels."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def groupnorm_cnn(channels: int) -> nn.Module:
    """Three convolutions of one width with GroupNorm and pooling: so small that the first batches' checks are seen."""
    layers: list[nn.Module] = []
    for inputs in (3, channels, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def digits(batches: int, batch_size: int, *, pixels: int = 8, channels: int = 1) -> DataLoader[Any]:
    """Load real handwritten digits, enlarged where asked, each as often as the batches need."""
    images = load_images("digits")
    pick = torch.arange(batches * batch_size) % len(images.train_labels)
    inputs = F.interpolate(images.train_images[pick].float() / 255, size=pixels).expand(-1, channels, -1, -1)
    data = TensorDataset(inputs.contiguous(), images.train_labels[pick])
    return DataLoader(data, batch_size, shuffle=True, drop_last=True)


class StepSeconds(Callback):
    """Time the steps of the dense first epoch or of the epochs after it, the first few left out.

    Args:
        epochs: The epochs whose steps count; the run ends with the first step of a later one.
        skip: Steps of these epochs that are left out.
    """

    def __init__(self, *, epochs: range, skip: int) -> None:
        self.epochs = epochs
        self.skip = skip
        self.seconds: list[float] = []
        self._seen = 0
        self._last: float | None = None

    def on_train_epoch_start(self, *_: Any) -> None:
        self._last = None  # what happens between epochs is no step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.perf_counter()  # without waiting for a GPU: what counts here is the host
        if trainer.current_epoch in self.epochs:
            self._seen += 1
            if self._last is not None and self._seen > self.skip:
                self.seconds.append(now - self._last)
        self._last = now
        if trainer.current_epoch >= self.epochs.stop:
            trainer.should_stop = True


def quiet_trainer(callbacks: list[Callback], epochs: int, device: str) -> pl.Trainer:
    """Make a Trainer that does nothing besides training."""
    accelerator = "gpu" if on_gpu(device) else "cpu"
    return pl.Trainer(max_epochs=epochs, accelerator=accelerator, devices=1, callbacks=callbacks, **QUIET)


def without_garbage_collection(action: Callable[[], None]) -> float:
    """Run an action with Python's garbage collection off, and return its seconds."""
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin
    finally:
        gc.enable()


def step_seconds(variant: Variant, data: DataLoader[Any], options: argparse.Namespace) -> list[float]:
    """Train a fresh model in one variant, and return the seconds of its steady steps."""
    torch.manual_seed(0)
    epochs = range(1)
    if variant.mode == "prune" and variant.stage == "sparse":
        epochs = range(1, 1 + math.ceil(1 / options.rate))  # after a dense one, and each shorter than it
    times = StepSeconds(epochs=epochs, skip=options.skip)
    planned = epochs.stop + int(variant.stage == "warmup")  # a run without a sparse step would be warned of
    trainer = quiet_trainer([*variant.callbacks(options.rate), times], planned, options.device)
    model = Classifier(mlp(options.width))
    without_garbage_collection(lambda: trainer.fit(model, data))
    return times.seconds


def fit_seconds(rate: float | None, data: DataLoader[Any], options: argparse.Namespace) -> float:
    """Train a fresh model for a few steps, and return the seconds of the whole fit; without the callback for None."""
    torch.manual_seed(0)
    callbacks: list[Callback] = [] if rate is None else [SparseSelectionCallback(target_activation_rate=rate)]
    trainer = quiet_trainer(callbacks, 1, options.device)
    model = Classifier(groupnorm_cnn(options.channels))
    return without_garbage_collection(lambda: trainer.fit(model, data))


def in_rounds(measure: dict[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Measure everything once a round, each round beginning one further on, so that none is always first."""
    found: Seconds = {name: [] for name in measure}
    names = list(measure)
    for first in range(rounds):
        for index in range(len(names)):
            name = names[(first + index) % len(names)]
            found[name].append(measure[name]())
    return found


def row_of(name: str, seconds: list[float], plain: list[float]) -> dict[str, Any]:
    """Summarise one value a round beside that of the run without the callback."""
    shares = [own / other for own, other in zip(seconds, plain, strict=True)]
    return {
        "variant": name,
        "milliseconds": round(1000 * statistics.median(seconds), 3),
        "share_of_plain": round(statistics.median(shares), 3),
        "share_by_round": [round(share, 3) for share in shares],
    }


def small_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the steady steps of every variant: by medians, and by means, which hold what only some steps do."""
    data = digits(options.skip + options.steps, options.batch_size)
    measure = {v.name: (lambda v=v: step_seconds(v, data, options)) for v in VARIANTS}
    measure[PLAIN]()  # the process's first fit
    found = in_rounds(measure, options.rounds)
    medians = {name: [statistics.median(steps) for steps in rounds] for name, rounds in found.items()}
    means = {name: [statistics.mean(steps) for steps in rounds] for name, rounds in found.items()}
    rows = [row_of(name, medians[name], medians[PLAIN]) for name in found]
    for row in rows:
        name = row["variant"]
        row["share_of_mean"] = row_of(name, means[name], means[PLAIN])["share_of_plain"]
        row["steps_a_round"] = len(found[name][0])
    return {"benchmark": "overhead", "rate": options.rate, "width": options.width, "rows": rows}


def short_run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure whole fits of `partial` and of a run without the callback."""
    data = digits(options.short_steps, options.batch_size, pixels=options.pixels, channels=3)
    measure = {PLAIN: lambda: fit_seconds(None, data, options)}
    measure |= {f"partial, r = {r:g}": (lambda r=r: fit_seconds(r, data, options)) for r in (0.4, 0.1)}
    in_rounds(measure, 1)
    found = in_rounds(measure, options.rounds)
    rows = [row_of(name, seconds, found[PLAIN]) for name, seconds in found.items()]
    sizes = {"steps": options.short_steps, "channels": options.channels, "pixels": options.pixels}
    return {"benchmark": "overhead-short-run", **sizes, "rows": rows}


def settings(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `--tiny` makes everything small enough for a test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short-run", action="store_true", help="measure a fit of 24 steps instead of steady steps")
    parser.add_argument("--tiny", action="store_true", help="a few steps of small networks: does everything run?")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu() else "cpu")
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--skip", type=int, default=20, help="steps of each run that are not timed")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, help="of torch, on a CPU (1 for steps, 2 for the short run)")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    options.threads = options.threads or (2 if options.short_run else 1)
    vars(options).update(TINY if options.tiny else NETWORKS)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the record."""
    options = settings(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        measured = short_run(options) if options.short_run else small_steps(options)
        record = {**measured, "batch_size": options.batch_size, **provenance(options.device)}
    finally:
        torch.set_num_threads(threads)
    for row in record["rows"]:
        spread = f"{min(row['share_by_round']):.2f}-{max(row['share_by_round']):.2f}"
        mean = f", by means {row['share_of_mean']:.2f}" if "share_of_mean" in row else ""
        print(f"{row['variant']:16} {row['milliseconds']:9.2f} ms  {row['share_of_plain']:.3f} ({spread}){mean}")
    print(save(record, f"{record['benchmark']}-{kind(options.device)}", folder=options.out, indent=1))
    return record


if __name__ == "__main__":
    silence_lightning()
    main()
