"""Regress the progress of diabetes on ten measurements: 442 patients of scikit-learn's package, a squared loss.

python examples/tasks/regression.py --method ours
"""

from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.recipes import Comparison, chance, one_cycle

Method = Literal["dense", "shortened", "random", "ours"]
RUNS = Comparison(
    epochs=40,
    shortened=0.73,  # of the dense run's steps: the work of "ours"
    selections={
        "random": {"mode": "prune", "prune_steps": "keep", "target_activation_rate": 0.72, "significance": chance},
        "ours": {"mode": "prune", "target_coverage": 0.97},
    },
)
TEST_PATIENTS = 142


class Regressor(L.LightningModule):
    """A network of two layers on standardised values."""

    def __init__(self, lr: float = 5e-3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.net(x).squeeze(1), y)

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1))


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1) -> dict[str, float]:
    """Train once; return the share of the variance that is explained on test patients, and the work."""
    x, y = (torch.tensor(values, dtype=torch.float32) for values in load_diabetes(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))  # another split for each seed
    rows = order[TEST_PATIENTS:]
    test = order[:TEST_PATIENTS]
    x = (x - x[rows].mean(0)) / x[rows].std(0)
    y = (y - y[rows].mean()) / y[rows].std()
    loader = DataLoader(TensorDataset(x[rows], y[rows]), batch_size=32, shuffle=True, drop_last=True)
    L.seed_everything(seed, verbose=False)
    trainer = RUNS.trainer(method, len(loader), max_steps=max_steps)
    model = Regressor()
    trainer.fit(model, loader)
    with torch.no_grad():
        error = F.mse_loss(model.eval().net(x[test]).squeeze(1), y[test])
    explained = 1 - float(error / y[test].var(correction=0))
    return {"explained_variance": explained, "work": RUNS.work(method, trainer)}


if __name__ == "__main__":
    print(auto_cli(train))
