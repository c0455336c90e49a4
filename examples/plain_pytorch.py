"""Adaptive sparse training in a plain PyTorch loop, without Lightning: scikit-learn's digits, half a minute."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.core import SampleSelector, partial_mean
from lightning_ast.core.significance import el2n

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])

model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 32, 3, padding=1),
    torch.nn.BatchNorm2d(32),
    torch.nn.ReLU(),
    torch.nn.MaxPool2d(2),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 16, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
selector = SampleSelector(target_activation_rate=0.4)

for epoch in range(10):
    offered = selected = 0
    for x, y in DataLoader(TensorDataset(*train), batch_size=64, shuffle=True):
        logits = model(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        selection = selector.select(el2n(losses.detach(), logits.detach(), x, y))
        optimizer.zero_grad()
        partial_mean(losses, selection).backward()  # computes over the selected rows only
        optimizer.step()
        offered, selected = offered + len(x), selected + len(selection.indices)
    model.eval()
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
    model.train()
    print(f"epoch {epoch}: accuracy {accuracy:.2%}, trained on {selected / offered:.1%} of {offered} samples")
