"""The original's CIFAR-10 set-ups, its rule beside dense training and ours: 40 epochs of SimpleCNN in batches of 64.

    python examples/original/cifar10.py --method ours --root FOLDER_OR_NPZ

The methods train what the configurations beside this file say, at a size that one CPU thread trains in a minute:
6,000 images, a network of a quarter of the width, bf16. The whole of it is `--images 50000 --width 32 --precision
32-true`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from lightning_ast.recipes import configured, figures, without_selection

Method = Literal["dense", "shortened", "tenth", "dense_adam", "original_10", "original_6", "ours", "ours_6"]
CONFIGURATIONS: dict[Method, str] = {
    "dense": "cifar10_10_recommended",
    "shortened": "cifar10_10_recommended",  # dense, for the work of "ours"
    "tenth": "cifar10_10_recommended",  # dense, for the work that training on 10 % would be
    "dense_adam": "cifar10_10_original",  # dense, with the original's optimizer
    "original_10": "cifar10_10_original",
    "original_6": "cifar10_6_original",
    "ours": "cifar10_10_recommended",
    "ours_6": "cifar10_6_recommended",
}
EPOCHS = 40
DENSE_EPOCHS = {"dense": EPOCHS, "dense_adam": EPOCHS, "shortened": 33, "tenth": 4}


def train(
    method: Method = "ours",
    *,
    seed: int = 0,
    max_steps: int = -1,
    root: str = os.environ.get("CIFAR10", "data"),
    images: int = 6_000,
    width: int = 8,
    precision: str = "bf16-mixed",
) -> dict[str, float]:
    """Train by one method; return its test accuracy, and what it cost as shares of the dense run."""
    epochs = DENSE_EPOCHS.get(method, EPOCHS)
    trainer, model, data = configured(
        Path(__file__).parent / f"{CONFIGURATIONS[method]}.yaml",
        f"--trainer.max_epochs={epochs}",
        f"--trainer.max_steps={max_steps}",
        f"--trainer.check_val_every_n_epoch={epochs}",  # the accuracy at the end is what counts here
        "--trainer.num_sanity_val_steps=0",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.precision={precision}",
        f"--model.init_args.width={width}",
        f"--data.init_args.root={root}",
        f"--data.init_args.train_limit={images}",
        seed=seed,
    )
    if method in DENSE_EPOCHS:
        without_selection(trainer)
    trainer.fit(model, datamodule=data)
    if max_steps > 0:  # the run may have ended before its validation
        trainer.validate(model, datamodule=data, verbose=False)
    return figures(trainer, length=epochs / EPOCHS)


if __name__ == "__main__":
    print(auto_cli(train))
