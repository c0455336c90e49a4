"""Adaptive sparse training with Hugging Face's accelerate: scikit-learn's digits, half a minute."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.demo.data import load_images

accelerator = Accelerator(cpu=True)
set_seed(0)
digits = load_images("digits")
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
train = TensorDataset(digits.train_images / 255, digits.train_labels)
model, optimizer, loader = accelerator.prepare(
    network, torch.optim.Adam(network.parameters(), lr=0.003), DataLoader(train, batch_size=64, shuffle=True)
)
several = accelerator.num_processes > 1
average = (lambda value: accelerator.reduce(value, reduction="mean")) if several else None
gate = GradientGate(SampleSelector(target_coverage=0.9, rank=accelerator.process_index), average=average)

for epoch in range(10):
    selected = 0
    for images, labels in loader:
        with gate.trace((images, labels)):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        gate.open(loss, batch_size=len(images))
        accelerator.backward(loss)
        optimizer.step()
        selected += len(gate.selection.indices)
    with torch.no_grad():
        accuracy = (model(digits.test_images / 255).argmax(1) == digits.test_labels).float().mean()
    accelerator.print(f"epoch {epoch}: accuracy {accuracy:.2%}, trained on {selected / len(train):.1%} of the samples")
