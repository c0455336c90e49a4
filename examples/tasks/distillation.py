"""Distil a trained teacher into a small student: the samples are those where the student still differs.

    python examples/tasks/distillation.py --method ours

The loss is the divergence from the teacher's softened probabilities plus the cross-entropy of the labels. The teacher
is frozen, so most of a step is forward: `partial` saves little here, `prune` saves the teacher's forward too.
"""

import functools
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import nn

from lightning_ast.demo import ImageData, ResNet9
from lightning_ast.recipes import QUIET, Comparison, chance, one_cycle

Method = Literal["dense", "shortened", "random", "partial", "ours"]
RUNS = Comparison(
    epochs=8,
    shortened=0.87,  # of the dense run's steps: the work of "ours"
    selections={
        "random": {"mode": "prune", "prune_steps": "keep", "target_activation_rate": 0.82, "significance": chance},
        "partial": {"mode": "partial", "target_coverage": 0.9},
        "ours": {"mode": "prune", "target_coverage": 0.9},
    },
)
TEACHER_EPOCHS = 4
IMAGES = 4000
TEMPERATURE = 4.0


class Student(L.LightningModule):
    """A student beside its frozen teacher."""

    def __init__(self, teacher, lr: float = 2e-3):
        super().__init__()
        self.student = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 49, 10),
        )
        self.teacher = teacher.requires_grad_(False)
        self.lr = lr

    def on_train_epoch_start(self):
        self.teacher.eval()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(images) / TEMPERATURE, 1)
        scores = self.student(images)
        given = F.log_softmax(scores / TEMPERATURE, 1)
        divergence = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return TEMPERATURE**2 * divergence + 0.5 * F.cross_entropy(scores, labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("test_accuracy", (self.student(images).argmax(1) == labels).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return one_cycle(self, torch.optim.AdamW(self.student.parameters(), lr=self.lr))


@functools.cache
def trained_teacher(seed, root):
    """Train the teacher, a ResNet-9; its cost is no part of the work."""
    L.seed_everything(seed, verbose=False)
    teacher = ResNet9(in_channels=1, width=8)
    trainer = L.Trainer(max_epochs=TEACHER_EPOCHS, limit_val_batches=0, **QUIET)
    trainer.fit(teacher, datamodule=ImageData("fashion_mnist", root=root, batch_size=128, train_limit=IMAGES))
    return teacher.net


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, root: str = "data") -> dict[str, float]:
    """Train the student once; return its test accuracy, and the work as a share of the dense run's."""
    teacher = trained_teacher(seed, root)
    data = ImageData("fashion_mnist", root=root, batch_size=64, train_limit=IMAGES)
    data.setup("fit")
    L.seed_everything(seed, verbose=False)
    trainer = RUNS.trainer(method, len(data.train_dataloader()), max_steps=max_steps, limit_val_batches=0)
    model = Student(teacher)
    trainer.fit(model, datamodule=data)
    (figures,) = trainer.test(model, datamodule=data, verbose=False)
    return {**figures, "work": RUNS.work(method, trainer)}


if __name__ == "__main__":
    print(auto_cli(train))
