"""Compare ways to choose samples at equal work: easy first, hardest first, uncertain, diverse, random, and ours.

Each trains a CNN of three layers on 3,000 images of Fashion-MNIST, 12 epochs on one CPU thread.
"""

import argparse

import lightning as L

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.demo import ImageData, SimpleCNN
from lightning_ast.recipes import chance, diversity, easiest, entropy, hardest, margin

RULES = {
    "random": chance,
    "easiest": easiest,
    "hardest": hardest,
    "entropy": entropy,
    "margin": margin,
    "diversity": diversity,
}
METHODS = ("dense", "shortened", *RULES, "ours")
DATA = "fashion_mnist"
EPOCHS = 12
WORK = 0.77  # of ours, as a share of the dense run's: the methods that it is compared with get as much


def selection_for(method: str, seed: int) -> SparseSelectionCallback:
    """Return the callback of a method; dense runs have one that only counts."""
    if method in ("dense", "shortened"):
        return SparseSelectionCallback(target_activation_rate=1.0)
    if method == "ours":
        return SparseSelectionCallback(mode="prune", target_coverage=0.9, seed=seed)
    rate = (WORK * EPOCHS - 2) / (EPOCHS - 2)  # the first and the last epoch train on everything
    return SparseSelectionCallback(
        mode="prune", target_activation_rate=rate, prune_steps="keep", significance=RULES[method], seed=seed
    )


def train(method: str, *, seed: int = 0, max_steps: int = -1, root: str = "data") -> dict[str, float]:
    """Train by one of the methods; return the test accuracy and the work as a share of the dense run's."""
    L.seed_everything(seed, verbose=False)
    data = ImageData(DATA, root, batch_size=128, train_limit=3_000)
    selection = selection_for(method, seed)
    steps = EPOCHS * len(data.train_dataloader())
    callbacks = [selection]
    if selection.mode == "prune":
        callbacks.append(TwoStageScheduler(warmup_epochs=1, cooldown_epochs=1))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        max_steps=round(WORK * steps) if method == "shortened" and max_steps < 0 else max_steps,
        callbacks=callbacks,
        limit_val_batches=0,  # the test at the end is enough
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SimpleCNN(in_channels=1, image_size=data.images.train_images.shape[-1], width=8)
    trainer.fit(module, datamodule=data)
    accuracy = trainer.test(module, datamodule=data, verbose=False)[0]["val_acc"]
    dense = selection.ledger.flops.dense * steps * data.batch_size
    return {"accuracy": accuracy, "work": selection.ledger.spent_flops() / dense}


def main() -> None:
    """Train by one method and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="ours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--root", default="data", help="where Fashion-MNIST is, or is downloaded to")
    options = parser.parse_args()
    figures = train(options.method, seed=options.seed, max_steps=options.max_steps, root=options.root)
    for name, value in figures.items():
        print(f"{name:10} {value:.4f}")


if __name__ == "__main__":
    main()
