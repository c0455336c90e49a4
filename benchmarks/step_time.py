"""Time of a whole training step as a share of dense, in one process, rounds interleaved, medians.

    python benchmarks/step_time.py --root cifar10.npz

ResNet-9 on real CIFAR-10 images through Lightning: every mode at the rates 0.4 and 0.1; the first steps are
left out. On a CPU the network is narrow; on a GPU it is the full one in bf16. Writes a record.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import datetime, timezone
from typing import Any

import lightning.pytorch as pl
import torch
from cifar10 import RECORDS, commit, hardware

from lightning_ast import SparseSelectionCallback
from lightning_ast.core import cost_share
from lightning_ast.demo import ImageData, ResNet9

CONFIGURATIONS: list[tuple[str, float]] = [
    ("dense", 1.0),
    ("mask", 0.4),
    ("mask", 0.1),
    ("subset", 0.4),
    ("subset", 0.1),
]


class StepTimes(pl.Callback):
    """Seconds of each step, the first few left out."""

    def __init__(self, skip: int) -> None:
        self.skip, self.seconds, self.last = skip, [], 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if trainer.global_step > self.skip:
            self.seconds.append(now - self.last)
        self.last = now


def step_seconds(mode: str, rate: float, data: ImageData, options: argparse.Namespace) -> float:
    """Median seconds of a step of one short run."""
    pl.seed_everything(0, verbose=False)
    times = StepTimes(options.skip)
    callbacks: list[pl.Callback] = [times]
    if mode != "dense":
        callbacks.insert(0, SparseSelectionCallback(mode=mode, target_activation_rate=rate))  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_steps=options.steps,
        limit_val_batches=0,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ResNet9(3, width=options.width), datamodule=data)
    return statistics.median(times.seconds)


def main() -> None:
    """Measure in rounds, print, write the record."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--width", type=int, default=64 if gpu else 16)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60 if gpu else 20)
    parser.add_argument("--skip", type=int, default=20 if gpu else 6)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    data = ImageData("cifar10", options.root, options.batch_size, train_limit=64 * options.batch_size)
    data.setup("fit")
    step_seconds("dense", 1.0, data, options)  # warm up
    measured: dict[tuple[str, float], list[float]] = {configuration: [] for configuration in CONFIGURATIONS}
    for _ in range(options.rounds):
        for mode, rate in CONFIGURATIONS:
            measured[mode, rate].append(step_seconds(mode, rate, data, options))
    dense = measured["dense", 1.0]
    rows = []
    for (mode, rate), seconds in measured.items():
        shares = [s / d for s, d in zip(seconds, dense, strict=True)]
        rows.append(
            {
                "mode": mode,
                "rate": rate,
                "milliseconds": round(1000 * statistics.median(seconds), 1),
                "share_of_dense": round(statistics.median(shares), 3),
                "share_by_round": [round(share, 3) for share in shares],
                "cost_model": 1.0 if mode == "dense" else round(cost_share(mode, rate), 3),  # type: ignore[arg-type]
            }
        )
        print(rows[-1])
    record = {
        "benchmark": "step-time",
        "model": f"ResNet-9, width {options.width}, CIFAR-10, B={options.batch_size}",
        "hardware": hardware(),
        "rows": rows,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"step-time-{'gpu' if gpu else 'cpu'}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
