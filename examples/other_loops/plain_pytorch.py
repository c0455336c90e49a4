"""Adaptive sparse training in a plain PyTorch loop, without Lightning: scikit-learn's digits, half a minute."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.core import GradientGate, SampleSelector

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train = (images[:1400], labels[:1400])
test = (images[1400:], labels[1400:])

model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 32, 3, padding=1),
    torch.nn.BatchNorm2d(32),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 16, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
gate = GradientGate(SampleSelector(target_activation_rate=0.4))

for epoch in range(10):
    offered = selected = 0
    for x, y in DataLoader(TensorDataset(*train), batch_size=64, shuffle=True):
        with gate.trace((x, y)):  # follows one sample through the first forward: which rows are whose
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        gate.open(loss, batch_size=len(x))
        loss.backward()  # computes over the selected rows only
        optimizer.step()
        offered = offered + len(x)
        selected = selected + len(gate.selection.indices)
    model.eval()
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
    model.train()
    print(f"epoch {epoch}: accuracy {accuracy:.2%}, trained on {selected / offered:.1%} of {offered} samples")
