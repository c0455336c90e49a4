"""Time of a warmup step with the callback attached, as a share of the plain step: "off" must cost nothing.

    python benchmarks/warmup_time.py --root cifar10.npz

Both Trainers run in one process, an epoch of the one, an epoch of the other, in turns; the median of the steps of each
epoch, and the median of the quotients of neighbouring epochs. With a logger, as Lightning logs by default. One record.
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
from record import RECORDS, kind, provenance, save
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo import ResNet9
from lightning_ast.demo.data import load_images

MODES = ("plain", "mask", "subset", "partial", "prune")


class StepTimes(pl.Callback):
    """Seconds from the end of a step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_epoch_start(self, *_: Any) -> None:
        self._last = None

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def fit(mode: str, data: DataLoader[Any], width: int, folder: str) -> float:
    """Median seconds of a step of the second and third of three warmup epochs, before a fourth that is not run."""
    pl.seed_everything(0, verbose=False)
    times = StepTimes()
    ours = [] if mode == "plain" else [SparseSelectionCallback(mode=mode), TwoStageScheduler(warmup_epochs=4)]  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=5,
        callbacks=[times, *ours, StopAfter(3)],
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ResNet9(3, width=width), data)
    steps = len(data) - 1
    return statistics.median(times.seconds[steps : 3 * steps])


class StopAfter(pl.Callback):
    """Ends the run after so many epochs of a longer plan."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def main() -> None:
    """Measure in rounds, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sizes", default="8x32,8x128", help="width x batch size, comma-separated")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load_images("cifar10", options.root)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            width, batch = map(int, size.split("x"))
            count = options.steps * batch
            x, y = images.train_images[:count].float() / 255, images.train_labels[:count]
            data = DataLoader(TensorDataset(x, y), batch_size=batch)
            shares: dict[str, list[float]] = {mode: [] for mode in MODES[1:]}
            plains = []
            for _ in range(options.rounds):
                for mode in MODES[1:]:
                    before, ours, after = (fit(m, data, width, folder) for m in ("plain", mode, "plain"))
                    shares[mode].append(2 * ours / (before + after))
                    plains += [before, after]
            row = {
                "width": width,
                "batch_size": batch,
                "plain_seconds": statistics.median(plains),
                "share": {mode: statistics.median(v) for mode, v in shares.items()},
                "shares": shares,
            }
            print({k: v for k, v in row.items() if k != "shares"})
            rows.append(row)
    print(save({"benchmark": "warmup-time", "rows": rows, **provenance()}, f"warmup-time-{kind()}", folder=options.out))


if __name__ == "__main__":
    main()
