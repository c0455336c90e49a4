"""The original's laptop set-ups, its rule beside dense training and ours: 3 and 10 epochs of SimpleCNN on the CPU.

    python examples/original/laptop.py --method ours_10 --root FOLDER_OR_NPZ

The methods train what the configurations beside this file say, all of it: 50,000 images, the whole network. One CPU
thread takes two minutes for 3 epochs, and seven for 10. The number behind a method is that of its epochs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from lightning_ast.recipes import configured, figures, without_selection

Method = Literal[
    "dense_3",
    "dense_adam_3",  # dense, with the original's optimizer
    "original_3",
    "ours_3",
    "dense_10",
    "dense_adam_10",
    "shortened_10",  # dense, for the work of "ours_10"
    "original_10",
    "ours_10",
]
SHORTENED_EPOCHS = 8


def train(
    method: Method = "ours_10", *, seed: int = 0, max_steps: int = -1, root: str = os.environ.get("CIFAR10", "data")
) -> dict[str, float]:
    """Train by one method; return its test accuracy, and what it cost as shares of the dense run of its length."""
    kind, length = method.rsplit("_", 1)
    form = "original" if kind in ("original", "dense_adam") else "recommended"
    epochs = SHORTENED_EPOCHS if kind == "shortened" else int(length)
    trainer, model, data = configured(
        Path(__file__).parent / f"laptop_{length}_{form}.yaml",
        f"--trainer.max_epochs={epochs}",
        f"--trainer.max_steps={max_steps}",
        f"--trainer.check_val_every_n_epoch={epochs}",  # the accuracy at the end is what counts here
        "--trainer.num_sanity_val_steps=0",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        f"--data.init_args.root={root}",
        seed=seed,
    )
    if kind not in ("original", "ours"):
        without_selection(trainer)
    trainer.fit(model, datamodule=data)
    if max_steps > 0:  # the run may have ended before its validation
        trainer.validate(model, datamodule=data, verbose=False)
    return figures(trainer, length=epochs / int(length))


if __name__ == "__main__":
    print(auto_cli(train))
