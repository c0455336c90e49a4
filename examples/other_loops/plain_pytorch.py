"""Adaptive sparse training in a plain PyTorch loop, without Lightning: scikit-learn's digits, half a minute."""

from typing import Literal

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.demo.data import load_images

Method = Literal["dense", "ours"]
STEPS = 250


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1) -> dict[str, float]:
    """Train once; return the test accuracy, and the share of the samples that the backward ran over."""
    digits = load_images("digits")
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    data = TensorDataset(digits.train_images / 255, digits.train_labels)
    drawn = RandomSampler(data, num_samples=64 * (STEPS if max_steps < 0 else max_steps))
    gate = GradientGate(SampleSelector(target_coverage=0.9 if method == "ours" else 1.0))
    selected = 0
    for images, labels in DataLoader(data, batch_size=64, sampler=drawn):
        with gate.trace((images, labels)):  # follows one sample through the first forward: which rows are whose
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        gate.open(loss, batch_size=len(images))  # the one call
        loss.backward()  # computes over the selected rows alone
        optimizer.step()
        selected += len(gate.selection.indices)
    accuracy = (model(digits.test_images / 255).argmax(1) == digits.test_labels).float().mean()
    return {"test_accuracy": float(accuracy), "trained_on": selected / len(drawn)}


if __name__ == "__main__":
    print(auto_cli(train))
