"""Segment clothes on a canvas with a small U-Net: cross-entropy of pixels plus a Dice loss over the batch.

    python examples/dense_prediction/segmentation.py --method ours

Each image holds one or two pieces of Fashion-MNIST at random places of a noisy canvas; their pixels are the mask.
"""

from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader

from lightning_ast.demo.data import load_images
from lightning_ast.recipes import CLOTHING_KINDS, Comparison, chance, make_scenes, one_cycle

Method = Literal["dense", "shortened", "random", "ours"]
RUNS = Comparison(
    epochs=20,
    shortened=0.83,  # of the dense run's steps: the work of "ours"
    selections={
        "random": {"mode": "prune", "prune_steps": "follow", "target_activation_rate": 0.81, "significance": chance},
        # fewer steps on full batches: batches of 8 are not made smaller
        "ours": {"mode": "prune", "prune_steps": "follow", "target_coverage": 0.9},
    },
)
TRAIN_IMAGES = 1_600
TEST_IMAGES = 400
CLASSES = 5  # the background, and four kinds of clothing
SIZE = 48  # pixels


class UNet(nn.Module):
    """Two steps down, two up, with GroupNorm: ``(B, 1, H, W)`` to ``(B, classes, H, W)``."""

    def __init__(self, width=8):
        super().__init__()
        sizes = ((1, width), (width, 2 * width), (2 * width, 4 * width), (6 * width, 2 * width), (3 * width, width))
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU())
            for before, after in sizes
        )
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x):
        first, second, third, fourth, fifth = self.convolutions
        fine = first(x)
        middle = second(F.max_pool2d(fine, 2))
        coarse = third(F.max_pool2d(middle, 2))
        middle = fourth(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], 1))
        return self.head(fifth(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], 1)))


def dice_loss(scores, masks):
    """Return one minus the mean overlap of the classes, each over the whole batch: it mixes the samples."""
    p = scores.softmax(1)
    truth = F.one_hot(masks, CLASSES).movedim(-1, 1)
    overlap = 2 * (p * truth).sum((0, 2, 3)) / (p + truth).sum((0, 2, 3))
    return 1 - overlap.mean()


class Segmenter(L.LightningModule):
    """Two losses, added up: nothing here knows of selection."""

    def __init__(self, lr: float = 1e-2):
        super().__init__()
        self.net = UNet()
        self.lr = lr
        self.register_buffer("counts", torch.zeros(3, CLASSES), persistent=False)

    def training_step(self, batch, batch_idx):
        images, masks = batch
        scores = self.net(images)
        return F.cross_entropy(scores, masks) + dice_loss(scores, masks)

    def test_step(self, batch, batch_idx):
        images, masks = batch
        found = F.one_hot(self.net(images).argmax(1), CLASSES).flatten(0, 2)
        truth = F.one_hot(masks, CLASSES).flatten(0, 2)
        self.counts += torch.stack([(found * truth).sum(0), found.sum(0), truth.sum(0)])

    def mean_overlap(self):
        """Return the mean intersection over union of the classes, over all pixels of the test set."""
        both, found, truth = self.counts
        return float((both / (found + truth - both).clamp_min(1)).mean())

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr))


def samples(images, labels, count, seed):
    """Make images and the masks of their kinds of clothing."""
    scenes = make_scenes(images, CLOTHING_KINDS[labels], count=count, seed=seed, size=SIZE, most_objects=2)
    return [scene[:2] for scene in scenes]


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, root: str = "data") -> dict[str, float]:
    """Train once; return the mean intersection over union on test scenes, and the work as a share of dense."""
    images = load_images("fashion_mnist", root)
    train_set = samples(images.train_images, images.train_labels, TRAIN_IMAGES, seed=0)
    test_set = samples(images.test_images, images.test_labels, TEST_IMAGES, seed=1)
    loader = DataLoader(train_set, batch_size=8, shuffle=True, drop_last=True)
    L.seed_everything(seed, verbose=False)
    trainer = RUNS.trainer(method, len(loader), max_steps=max_steps)
    model = Segmenter()
    trainer.fit(model, loader)
    trainer.test(model, DataLoader(test_set, batch_size=100), verbose=False)
    return {"mean_iou": model.mean_overlap(), "work": RUNS.work(method, trainer)}


if __name__ == "__main__":
    print(auto_cli(train))
