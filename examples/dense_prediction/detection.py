"""Detect clothes on a canvas with torchvision's RetinaNet: lists of images, a dictionary of losses.

    python examples/dense_prediction/detection.py --method ours

Each image holds one or two pieces of Fashion-MNIST; the boxes are those of their pixels.
"""

from typing import Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from lightning_ast import SparseLossMixin
from lightning_ast.demo.data import load_images
from lightning_ast.recipes import CLOTHING_KINDS, Comparison, make_scenes, one_cycle

Method = Literal["dense", "shortened", "random", "ours"]
RUNS = Comparison(
    epochs=20,
    shortened=0.88,  # of the dense run's steps: the work of "ours"
    selections={
        "random": {"mode": "prune", "prune_steps": "follow", "target_activation_rate": 0.87, "significance": "loss"},
        # fewer steps on full batches: batches of 8 are not made smaller
        "ours": {"mode": "prune", "prune_steps": "follow", "target_coverage": 0.9},
    },
)
TRAIN_IMAGES = 1_280
TEST_IMAGES = 400
SIZE = 48  # pixels
SCORE = 0.3  # the least score of a detection that counts


def backbone(width=24):
    """Return three strided convolutions: one map of 6 x 6 places for an image of 48 x 48 pixels."""
    layers = []
    for before, after in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(before, after, 3, 2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    net = nn.Sequential(*layers)
    net.out_channels = 2 * width
    return net


class Detector(L.LightningModule):
    """torchvision's detector as in its tutorial: the losses are added up."""

    def __init__(self, lr: float = 7e-4):
        super().__init__()
        anchors = AnchorGenerator(((14, 20, 28),), ((0.5, 1.0, 2.0),))
        size = {"min_size": SIZE, "max_size": SIZE, "image_mean": [0.2], "image_std": [0.3]}
        self.model = RetinaNet(backbone(), num_classes=4, anchor_generator=anchors, detections_per_img=20, **size)
        self.lr = lr
        self.found = 0  # true boxes that were found
        self.boxes = 0  # true boxes and detections

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return sum(self.model(images, targets).values())

    def test_step(self, batch, batch_idx):
        images, targets = batch
        for detection, target in zip(self.model(images), targets, strict=True):
            sure = detection["scores"] > SCORE
            same = detection["labels"][sure][:, None] == target["labels"]
            hits = (box_iou(detection["boxes"][sure], target["boxes"]) >= 0.5) & same
            self.found += int(hits.any(0).sum())
            self.boxes += int(sure.sum()) + len(target["labels"])

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.parameters(), lr=self.lr))


class DetectorByChance(SparseLossMixin, Detector):
    """All images score alike, so that a selection by loss keeps a random share of them: the baseline."""

    def per_sample_loss(self, batch, batch_idx):
        images, _ = batch
        return torch.ones(len(images))

    def training_step(self, batch, batch_idx):
        self.per_sample_loss(batch, batch_idx)  # what the callback scores by is what this returns
        return super().training_step(batch, batch_idx)


def samples(images, labels, count, seed):
    """Make scenes of one or two pieces, whose classes are the kinds of clothing."""
    return make_scenes(images, CLOTHING_KINDS[labels], count=count, seed=seed, size=SIZE, most_objects=2)


def pairs_of_lists(scenes):
    """Return a list of images and a list of dictionaries, as torchvision's detectors take them."""
    return [s.image for s in scenes], [{"boxes": s.boxes, "labels": s.labels} for s in scenes]


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, root: str = "data") -> dict[str, float]:
    """Train once; return the F1 score of the boxes at an overlap of 0.5, and the work as a share of dense."""
    images = load_images("fashion_mnist", root)
    train_set = samples(images.train_images, images.train_labels, TRAIN_IMAGES, seed=0)
    test_set = samples(images.test_images, images.test_labels, TEST_IMAGES, seed=1)
    loader = DataLoader(train_set, batch_size=8, shuffle=True, drop_last=True, collate_fn=pairs_of_lists)
    L.seed_everything(seed, verbose=False)
    trainer = RUNS.trainer(method, len(loader), max_steps=max_steps)
    model = DetectorByChance() if method == "random" else Detector()
    trainer.fit(model, loader)
    trainer.test(model, DataLoader(test_set, batch_size=50, collate_fn=pairs_of_lists), verbose=False)
    return {"f1_at_half_overlap": 2 * model.found / model.boxes, "work": RUNS.work(method, trainer)}


if __name__ == "__main__":
    print(auto_cli(train))
