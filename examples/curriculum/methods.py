"""Compare ways to choose samples at equal work: easy first, hardest first, uncertain, diverse, random, and ours.

Each trains a CNN of three layers on 3,000 images of Fashion-MNIST, 12 epochs on one CPU thread.
"""

from typing import Literal

import lightning as L
from jsonargparse import auto_cli

from lightning_ast.demo import ImageData, SimpleCNN
from lightning_ast.recipes import Comparison, chance, diversity, easiest, entropy, hardest, margin

RULES = {
    "random": chance,
    "easiest": easiest,
    "hardest": hardest,
    "entropy": entropy,
    "margin": margin,
    "diversity": diversity,
}
Method = Literal["dense", "shortened", "random", "easiest", "hardest", "entropy", "margin", "diversity", "ours"]
DATA = "fashion_mnist"
EPOCHS = 12
WORK = 0.77  # of ours, as a share of the dense run's: the methods that it is compared with get as much


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, root: str = "data") -> dict[str, float]:
    """Train by one of the methods; return the test accuracy and the work as a share of the dense run's."""
    L.seed_everything(seed, verbose=False)
    data = ImageData(DATA, root, batch_size=128, train_limit=3_000)
    rate = (WORK * EPOCHS - 2) / (EPOCHS - 2)  # the first and the last epoch train on everything
    same = {"mode": "prune", "prune_steps": "keep", "target_activation_rate": rate, "seed": seed}
    selections = {name: {**same, "significance": rule} for name, rule in RULES.items()}
    selections["ours"] = {"mode": "prune", "target_coverage": 0.9, "seed": seed}
    runs = Comparison(EPOCHS, WORK, selections)
    batches = len(data.train_dataloader())
    trainer = runs.trainer(method, batches, max_steps=max_steps, limit_val_batches=0, accelerator="cpu")
    module = SimpleCNN(in_channels=1, image_size=data.images.train_images.shape[-1], width=8)
    trainer.fit(module, datamodule=data)
    accuracy = trainer.test(module, datamodule=data, verbose=False)[0]["val_acc"]
    return {"accuracy": accuracy, "work": runs.work(method, trainer)}


if __name__ == "__main__":
    print(auto_cli(train))
