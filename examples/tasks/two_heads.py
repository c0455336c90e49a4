"""Train a model with two heads: what a piece of clothing is, and where it lies. Two losses, one selection.

python examples/tasks/two_heads.py --method ours
"""

from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader

from lightning_ast.demo.data import load_images
from lightning_ast.recipes import Comparison, chance, make_scenes, one_cycle

Method = Literal["dense", "shortened", "random", "ours"]
RUNS = Comparison(
    epochs=12,
    shortened=0.87,  # of the dense run's steps: the work of "ours"
    selections={
        "random": {"mode": "prune", "prune_steps": "keep", "target_activation_rate": 0.84, "significance": chance},
        "ours": {"mode": "prune", "target_coverage": 0.9},
    },
)
TRAIN_IMAGES = 2000
TEST_IMAGES = 1000
SIZE = 48  # pixels


class TwoHeads(L.LightningModule):
    """One trunk, a head for the class and one for the middle of the box."""

    def __init__(self, lr: float = 4e-3):
        super().__init__()
        layers = []
        for before, after in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (SIZE // 8) ** 2, 64), nn.ReLU())
        self.what = nn.Linear(64, 10)
        self.where = nn.Linear(64, 2)
        self.lr = lr

    def forward(self, images):
        features = self.trunk(images)
        return self.what(features), self.where(features)

    def training_step(self, batch, batch_idx):
        images, labels, middles = batch
        scores, places = self(images)
        return F.cross_entropy(scores, labels) + 10 * F.smooth_l1_loss(places, middles)

    def test_step(self, batch, batch_idx):
        images, labels, middles = batch
        scores, places = self(images)
        self.log("accuracy", (scores.argmax(1) == labels).float().mean())
        self.log("error_in_pixels", SIZE * (places - middles).norm(dim=1).mean())

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr))


def samples(images, labels, count, seed):
    """Make scenes of one piece each: the image, its class, the middle of its box in shares of the image."""
    scenes = make_scenes(images, labels, count=count, seed=seed, size=SIZE, most_objects=1)
    return [(s.image, s.labels[0], (s.boxes[0, :2] + s.boxes[0, 2:]) / 2 / SIZE) for s in scenes]


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, root: str = "data") -> dict[str, float]:
    """Train once; return the test accuracy, the mean error of the place in pixels, and the work."""
    images = load_images("fashion_mnist", root)
    train_set = samples(images.train_images, images.train_labels, TRAIN_IMAGES, seed=0)
    test_set = samples(images.test_images, images.test_labels, TEST_IMAGES, seed=1)
    loader = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    L.seed_everything(seed, verbose=False)
    trainer = RUNS.trainer(method, len(loader), max_steps=max_steps)
    model = TwoHeads()
    trainer.fit(model, loader)
    (figures,) = trainer.test(model, DataLoader(test_set, batch_size=250), verbose=False)
    return {**figures, "work": RUNS.work(method, trainer)}


if __name__ == "__main__":
    print(auto_cli(train))
