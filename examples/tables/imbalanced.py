"""Train on a table whose classes are imbalanced, and see what selection does to the rare ones: a minute on one CPU.

The table is Fashion-MNIST as 64 principal components. The most frequent class has 3,200 rows, the rarest 32.
"""

from typing import Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from sklearn.decomposition import PCA
from sklearn.metrics import recall_score
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.demo.data import load_images
from lightning_ast.recipes import Comparison, chance, one_cycle

Method = Literal["dense", "shortened", "random", "ours", "floor", "dense_even", "ours_even"]
EPOCHS = 15
WORK = 0.77  # of ours, as a share of the dense run's: the methods that it is compared with get as much
ROWS = 8_000
BATCH = 128


class Table(L.LightningModule):
    """A classifier of rows that counts the rows of each class it was trained on."""

    def __init__(self, columns: int, classes: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(columns, 256),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(256, 256),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(256, classes),
        )
        self.trained = torch.zeros(classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the batch."""
        rows, labels = batch
        self.trained += labels.bincount(minlength=len(self.trained))
        return F.cross_entropy(self.net(rows), labels)

    def configure_optimizers(self) -> dict:
        """Make AdamW with one cycle over the run."""
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01), rises=0.3)


def make_table(ratio: float, root: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows and labels for training, the classes from frequent to rare, and rows and labels for the test."""
    images = load_images("fashion_mnist", root)
    order = np.random.default_rng(0).permutation(10)  # which class is rare is drawn once, whatever the seed
    place_of = torch.from_numpy(order.argsort())
    labels = place_of[images.train_labels]
    shares = torch.tensor([ratio ** (-place / 9) for place in range(10)])
    counts = (ROWS * shares / shares.sum()).round().int().tolist()
    rows = torch.cat([(labels == place).nonzero().squeeze(1)[:count] for place, count in enumerate(counts)])
    pixels = images.train_images[rows].flatten(1).numpy() / 255
    pca = PCA(64, random_state=0).fit(pixels)
    train = torch.from_numpy(pca.transform(pixels)).float()
    test = torch.from_numpy(pca.transform(images.test_images.flatten(1).numpy() / 255)).float()
    return train / train.std(0), labels[rows], test / train.std(0), place_of[images.test_labels]


def rare_rows(labels: Tensor) -> Tensor:
    """Return the indices of the rows whose class has less than a tenth of the rows of the most frequent one."""
    rows = labels.bincount()
    return (rows < 0.1 * rows.max())[labels].nonzero().squeeze(1)


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, root: str = "data") -> dict[str, float]:
    """Train by one of the methods; return recalls as shares and the work as a share of the dense run's."""
    method, _, is_even = method.partition("_")
    table, labels, test, test_labels = make_table(1 if is_even else 100, root)
    L.seed_everything(seed, verbose=False)
    module = Table(table.shape[1], 10)
    selections = {
        "random": {
            "target_activation_rate": (WORK * EPOCHS - 2) / (EPOCHS - 2),  # the first and last epoch are dense
            "prune_steps": "keep",
            "significance": chance,
        },
        "ours": {"target_coverage": 0.97},
        "floor": {"target_coverage": 0.97, "always": rare_rows(labels)},
    }
    same = {"mode": "prune", "seed": seed}
    runs = Comparison(EPOCHS, WORK, {name: {**same, **options} for name, options in selections.items()})
    loader = DataLoader(TensorDataset(table, labels), batch_size=BATCH, shuffle=True, drop_last=True)
    trainer = runs.trainer(method, len(loader), max_steps=max_steps, accelerator="cpu")
    trainer.fit(module, loader)
    module.eval()
    with torch.no_grad():
        predicted = module.net(test).argmax(1)
    recalls = recall_score(test_labels, predicted, average=None)
    offered = EPOCHS * labels.bincount(minlength=10)
    trained = module.trained / offered
    return {
        "accuracy_balanced": float(recalls.mean()),
        "recall_frequent": float(recalls[:3].mean()),
        "recall_rare": float(recalls[7:].mean()),
        "trained_frequent": float(trained[:3].mean()),
        "trained_rare": float(trained[7:].mean()),
        "work": runs.work(method, trainer),
    }


if __name__ == "__main__":
    print(auto_cli(train))
