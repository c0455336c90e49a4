"""CIFAR-10 with 20 training images that hold NaN or infinity: the plain run, and every mode.

    python benchmarks/bad_samples.py --root cifar10.npz

Ten images have a NaN pixel, five plus and five minus infinity: what a failed decoder or a division by zero leaves. The
same run without them stands beside. One record.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import lightning.pytorch as pl
import torch
from cifar10 import run_parser
from record import QUIET, kind, provenance, save

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo import ImageData, ResNet9

VALUES = [math.nan] * 10 + [math.inf] * 5 + [-math.inf] * 5
RUNS = [("plain", True), ("plain", False), ("partial", True), ("partial", False), ("subset", True), ("prune", True)]


class CorruptedData(ImageData):
    """The images of CIFAR-10, one pixel of 20 of them overwritten."""

    def corrupt(self, seed: int) -> list[int]:
        """Overwrite the pixels, and return the indices of the images."""
        images = self.images
        where = torch.randperm(len(images.train_labels), generator=torch.Generator().manual_seed(seed))[: len(VALUES)]
        pixels = images.train_images.float()
        pixels[where, 0, 16, 16] = torch.tensor(VALUES)
        self._images = images._replace(train_images=pixels)
        return sorted(where.tolist())


def measure(policy: str, corrupted: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Train once."""
    pl.seed_everything(options.seed, verbose=False)
    model = ResNet9(3, width=options.width)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = CorruptedData("cifar10", options.root, options.batch_size, train_limit=options.train_limit)
    where = data.corrupt(options.seed) if corrupted else []
    selection = None if policy == "plain" else SparseSelectionCallback(mode=policy, target_activation_rate=options.rate)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        precision="bf16-mixed",
        callbacks=[] if selection is None else [selection, TwoStageScheduler(warmup_epochs=1)],
        **QUIET,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    found = [] if selection is None else selection.quarantined
    row = {
        "policy": policy,
        "corrupted": len(where),
        "accuracy": round(float(trainer.callback_metrics["val_acc"]), 4),
        "finite": all(bool(p.isfinite().all()) for p in model.state_dict().values()),
        "quarantined_by_epoch": [sum(s.epoch == epoch for s in found) for epoch in range(options.epochs)],
        "named": sorted({s.index for s in found if s.index >= 0}) == where if policy == "prune" else None,
    }
    print(row)
    return row


def main() -> None:
    """Run them all, write the record."""
    options = run_parser(__doc__, width=8, train_limit=20_000).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [measure(policy, corrupted, options) for policy, corrupted in RUNS]
    names = ("rate", "seed", "epochs", "batch_size", "width", "train_limit")
    settings = {name: getattr(options, name) for name in names}
    record = {"benchmark": "bad-samples", "settings": settings, "rows": rows, **provenance()}
    print(save(record, f"bad-samples-{kind()}", folder=options.out, indent=1))


if __name__ == "__main__":
    main()
