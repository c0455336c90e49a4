"""Wall time of a pruned epoch as a share of a dense epoch of the same run, loading and planning included.

    python benchmarks/prune_time.py --root cifar10.npz

Two kinds of run for each rate, several rounds, interleaved. `compute`: ResNet-9 on CIFAR-10 in memory: the step binds.
`loader`: JPEG files (CIFAR-10 enlarged to 224 px), read through torchvision's ImageFolder, decoded, cropped and flipped
by worker processes for a network that costs nothing: the loader binds. The time of an epoch is that from the end of the
epoch before to its own end; the first epoch is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from record import QUIET, RECORDS, kind, provenance, save
from torch import nn
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo import ImageData, ResNet9
from lightning_ast.demo.data import load_images
from lightning_ast.demo.models import ImageClassifier

DENSE = 3
SPARSE = 4
"""Dense epochs before and after the pruned ones, and pruned epochs."""


class EpochTimes(pl.Callback):
    """The seconds of each epoch, from the end of the one before."""

    def __init__(self) -> None:
        self.dense: list[float] = []
        self.sparse: list[float] = []
        self._last: float | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        selection = next(c for c in trainer.callbacks if isinstance(c, SparseSelectionCallback))
        if self._last is not None:
            (self.sparse if selection.stage == "sparse" else self.dense).append(now - self._last)
        self._last = now


def write_images(root: Path, folder: Path, count: int) -> None:
    """Write the first images as JPEG files of 224 px, one folder a class."""
    from PIL import Image

    images = load_images("cifar10", str(root))
    for index in range(count):
        pixels = images.train_images[index].permute(1, 2, 0).numpy()
        place = folder / str(int(images.train_labels[index]))
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC).save(
            place / f"{index:05d}.jpg", quality=90
        )


def folder_loader(folder: Path, workers: int) -> DataLoader[Any]:
    """Load images from folders as an ImageNet script does."""
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(160), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    return DataLoader(
        data, batch_size=64, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )


def tiny() -> ImageClassifier:
    """Make a network that costs nothing."""
    net = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(300, 10))
    return ImageClassifier(net, lr=0.01)


def measure(bound_by: str, rate: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train once: dense, pruned, dense."""
    pl.seed_everything(0, verbose=False)
    if bound_by == "compute":
        model: Any = ResNet9(3, width=options.width)
        data: dict[str, Any] = {
            "datamodule": ImageData("cifar10", str(options.root), batch_size=128, train_limit=options.images)
        }
    else:
        model = tiny()
        data = {"train_dataloaders": folder_loader(folder, options.workers)}
    times = EpochTimes()
    trainer = pl.Trainer(
        max_epochs=2 * DENSE + SPARSE,
        callbacks=[
            SparseSelectionCallback(mode="prune", target_activation_rate=rate),
            TwoStageScheduler(warmup_epochs=DENSE, cooldown_epochs=DENSE),
            times,
        ],
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        limit_val_batches=0,
        **QUIET,
    )
    trainer.fit(model, **data)
    row = {
        "bound_by": bound_by,
        "rate": rate,
        "share": round(statistics.median(times.sparse) / statistics.median(times.dense), 4),
        "dense_seconds": [round(s, 3) for s in times.dense],
        "sparse_seconds": [round(s, 3) for s in times.sparse],
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--rates", type=float, nargs="+", default=[0.6, 0.4, 0.2])
    parser.add_argument("--images", type=int, default=6400, help="of the compute-bound run; the other has half of them")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_images(options.root, Path(name), options.images // 2)
        rows = [
            measure(bound_by, rate, options, Path(name))
            for _ in range(options.rounds)
            for bound_by in ("compute", "loader")
            for rate in options.rates
        ]
    record = {
        "benchmark": "prune-time",
        "rows": rows,
        "settings": {"images": options.images, "width": options.width, "workers": options.workers},
        **provenance(),
    }
    path = save(record, f"prune-time-{kind()}", folder=options.out)
    print(path)


if __name__ == "__main__":
    main()
