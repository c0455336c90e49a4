"""Images a second of ImageNet's recipe on made JPEG files, dense and sparse, beside the loader alone.

    python benchmarks/image_loading.py                # ResNet-50 at 224 pixels, on a GPU
    python benchmarks/image_loading.py --workers 16

The images are noise of low resolution, enlarged and saved as JPEG files of 500 x 375 pixels in 100 folders: decoding
and cropping take the time that they take for photographs, and what is learned does not matter. A run that is hardly
slower than the loader alone is bound by it; then only `prune`, which loads fewer images, saves seconds. Each run has a
dense epoch first; its second one is timed. Images are those of the data set that a step stands for: all that were
offered. Writes one record.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from record import QUIET, RECORDS, kind, on_gpu, provenance, save, silence_lightning

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.recipes import FineTunedClassifier, ImageFolderDataModule

RATE = 0.4
RUNS = ("dense", "partial", "subset", "prune")
TINY = {"network": "resnet18", "batch_size": 4, "steps": 6, "skip": 1, "workers": 0, "classes": 4, "image_size": 32}
"""The options of `--tiny`."""


def make_images(root: Path, *, classes: int, each: int) -> None:
    """Write `train` and `val`, each class a folder of JPEG files: one image under several names."""
    generator = torch.Generator().manual_seed(0)
    for number in range(classes):
        image = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=generator).numpy()
        for part, count in (("train", each), ("val", 1)):
            folder = root / part / f"class{number:03}"
            folder.mkdir(parents=True)
            Image.fromarray(image).resize((500, 375)).save(folder / "0.jpg", quality=90)
            for index in range(1, count):
                os.link(folder / "0.jpg", folder / f"{index}.jpg")


class ImageRate(pl.Callback):
    """Count the images of the dataset that the timed epoch stands for, and its seconds.

    Args:
        epoch: The epoch that is timed, its first steps left out.
        skip: The steps that are left out.
    """

    def __init__(self, *, epoch: int, skip: int) -> None:
        self.epoch = epoch
        self.skip = skip
        self.steps = 0
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch != self.epoch or batch_idx + 1 < self.skip:
            return
        now = self._now()
        if batch_idx + 1 == self.skip:
            self.begin = now
        self.steps = batch_idx + 1 - self.skip
        self.seconds = now - self.begin

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def callbacks_of(run: str) -> list[pl.Callback]:
    """Make the callbacks of a run."""
    if run == "dense":
        return []
    steps: Any = {"prune_steps": "follow"} if run == "prune" else {}
    selection = SparseSelectionCallback(mode=run, target_activation_rate=RATE, **steps)  # type: ignore[arg-type]
    return [selection, TwoStageScheduler(warmup_epochs=1)]


def images_per_second(run: str, data: ImageFolderDataModule, options: argparse.Namespace) -> dict[str, Any]:
    """Train two epochs, and return the images a second of the second, as the dataset counts them."""
    pl.seed_everything(0, verbose=False)
    rate = ImageRate(epoch=1, skip=options.skip)
    trainer = pl.Trainer(
        max_epochs=2,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        precision="bf16-mixed" if on_gpu(options.device) else "32-true",
        accelerator="gpu" if on_gpu(options.device) else "cpu",
        devices=1,
        callbacks=[*callbacks_of(run), rate],
        **QUIET,
    )
    trainer.fit(FineTunedClassifier(options.network, weights=None, num_classes=options.classes), datamodule=data)
    trained = rate.steps * options.batch_size
    stands_for = trained / RATE if run == "prune" else trained
    return {
        "run": run,
        "images_per_second": round(stands_for / rate.seconds, 1),
        "trained_images_per_second": round(trained / rate.seconds, 1),
        "steps": rate.steps,
    }


def loaded_per_second(data: ImageFolderDataModule, options: argparse.Namespace) -> dict[str, Any]:
    """Load an epoch without training on it."""
    data.setup("fit")
    batches: Iterator[Any] = iter(data.train_dataloader())
    for _ in itertools.islice(batches, options.skip):
        pass
    begin = time.perf_counter()
    steps = sum(1 for _ in batches)
    seconds = time.perf_counter() - begin
    return {"run": "loader alone", "images_per_second": round(steps * options.batch_size / seconds, 1), "steps": steps}


def settings(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu() else "cpu")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="of an epoch")
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a few steps of a small network")
    parser.add_argument("--out", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    options.classes = 100
    options.image_size = 224
    if options.tiny:
        vars(options).update(TINY)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the record."""
    options = settings(arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), classes=options.classes, each=options.steps * options.batch_size // options.classes)
        data = ImageFolderDataModule(
            folder, image_size=options.image_size, batch_size=options.batch_size, num_workers=options.workers
        )
        rows = [loaded_per_second(data, options)]
        rows += [images_per_second(run, data, options) for run in RUNS]
    for row in rows:
        print(row, flush=True)
    (loader, dense, *_) = (row["images_per_second"] for row in rows)
    record = {
        "benchmark": "image-loading",
        "network": options.network,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "rate": RATE,
        "bound_by": "loader" if dense > 0.9 * loader else "arithmetic",
        "rows": rows,
        **provenance(options.device),
    }
    save(record, f"image-loading-{kind(options.device)}", folder=options.out, indent=1)
    return record


if __name__ == "__main__":
    silence_lightning()
    main()
