"""Adaptive sparse training with Hugging Face's accelerate: scikit-learn's digits, half a minute.

    python examples/other_loops/with_accelerate.py
    torchrun --nproc_per_node 2 examples/other_loops/with_accelerate.py

Several processes select as one, from one large batch; each prints its own share.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from jsonargparse import auto_cli
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.demo.data import load_images

Method = Literal["dense", "ours"]
STEPS = 250


def train(method: Method = "ours", *, seed: int = 0, max_steps: int = -1) -> dict[str, float]:
    """Train once; return the test accuracy, and the share of the samples that the backward ran over."""
    accelerator = Accelerator(cpu=True)
    set_seed(seed)
    digits = load_images("digits")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    data = TensorDataset(digits.train_images / 255, digits.train_labels)
    drawn = RandomSampler(data, num_samples=64 * (STEPS if max_steps < 0 else max_steps))
    loader = DataLoader(data, batch_size=64 // accelerator.num_processes, sampler=drawn)
    model, optimizer, loader = accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=0.003), loader)
    selector = SampleSelector(target_coverage=0.9 if method == "ours" else 1.0, rank=accelerator.process_index)
    several = accelerator.num_processes > 1
    average = (lambda value: accelerator.reduce(value, reduction="mean")) if several else None
    gate = GradientGate(selector, average=average)
    offered = selected = 0
    for images, labels in loader:
        with gate.trace((images, labels)):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        gate.open(loss, batch_size=len(images))
        accelerator.backward(loss)
        optimizer.step()
        offered += len(images)
        selected += len(gate.selection.indices)
    accuracy = (model(digits.test_images / 255).argmax(1) == digits.test_labels).float().mean()
    return {"test_accuracy": float(accuracy), "trained_on": selected / offered}


if __name__ == "__main__":
    print(auto_cli(train))
