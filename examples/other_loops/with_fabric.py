"""Adaptive sparse training with Fabric: scikit-learn's digits, half a minute. Several processes are one batch."""

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.demo.data import load_images

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
fabric.seed_everything(0, verbose=False)
digits = load_images("digits")
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
model, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=0.003))
train = TensorDataset(digits.train_images / 255, digits.train_labels)
loader = fabric.setup_dataloaders(DataLoader(train, batch_size=64, shuffle=True))

selector = SampleSelector(target_coverage=0.9, rank=fabric.global_rank)
average = (lambda value: fabric.all_reduce(value, reduce_op="mean")) if fabric.world_size > 1 else None
gate = GradientGate(selector, average=average)

for epoch in range(10):
    selected = 0
    for images, labels in loader:
        with gate.trace((images, labels)):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        gate.open(loss, batch_size=len(images))
        fabric.backward(loss)
        optimizer.step()
        selected += len(gate.selection.indices)
    with torch.no_grad():
        accuracy = (model(digits.test_images / 255).argmax(1) == digits.test_labels).float().mean()
    fabric.print(f"epoch {epoch}: accuracy {accuracy:.2%}, trained on {selected / len(train):.1%} of the samples")
