"""Adaptive sparse training in a plain PyTorch loop, without Lightning: scikit-learn's digits, half a minute."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.core import SampleSelector, TracelessForward, select_batch, selected_mean
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
score_only = TracelessForward(model)

for epoch in range(10):
    offered = selected = 0
    for batch in DataLoader(TensorDataset(*train), batch_size=64, shuffle=True):
        x, y = batch
        with score_only():  # no gradient, and BatchNorm's running statistics stay as they are
            logits = model(x)
            losses = F.cross_entropy(logits, y, reduction="none")
        selection = selector.select(el2n(losses, logits, x, y))
        x, y = select_batch((x, y), selection.indices)
        loss = selected_mean(F.cross_entropy(model(x), y, reduction="none"), selection, batch_size=len(batch[0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        offered, selected = offered + len(batch[0]), selected + len(x)
    model.eval()
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
    model.train()
    print(f"epoch {epoch + 1}: accuracy {accuracy:.2%}, trained on {selected / offered:.1%} of {offered} samples")
