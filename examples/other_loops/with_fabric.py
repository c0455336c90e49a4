"""Adaptive sparse training with Fabric: scikit-learn's digits, half a minute.

    python examples/other_loops/with_fabric.py
    python examples/other_loops/with_fabric.py --devices 2

Several processes select as one, from one large batch; each prints its own share.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.demo.data import load_images

Method = Literal["dense", "ours"]
STEPS = 250


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1, devices: int = 1) -> dict[str, float]:
    """Train once; return the test accuracy, and the share of the samples that the backward ran over."""
    fabric = Fabric(accelerator="cpu", devices=devices)
    fabric.launch()
    fabric.seed_everything(seed, verbose=False)
    digits = load_images("digits")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.003))
    data = TensorDataset(digits.train_images / 255, digits.train_labels)
    drawn = RandomSampler(data, num_samples=64 * (STEPS if max_steps < 0 else max_steps))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=64 // fabric.world_size, sampler=drawn))
    selector = SampleSelector(target_coverage=0.9 if method == "ours" else 1.0, rank=fabric.global_rank)
    average = (lambda value: fabric.all_reduce(value, reduce_op="mean")) if fabric.world_size > 1 else None
    gate = GradientGate(selector, average=average)
    offered = selected = 0
    for images, labels in loader:
        with gate.trace((images, labels)):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        gate.open(loss, batch_size=len(images))
        fabric.backward(loss)
        optimizer.step()
        offered += len(images)
        selected += len(gate.selection.indices)
    accuracy = (model(digits.test_images / 255).argmax(1) == digits.test_labels).float().mean()
    return {"test_accuracy": float(accuracy), "trained_on": selected / offered}


if __name__ == "__main__":
    print(auto_cli(train))
