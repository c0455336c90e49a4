"""The gate in a loop of Fabric: one process, and two that train as one large batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ast.core import GradientGate, SampleSelector

SIZE, BATCH = 48, 12


def train(fabric: Fabric, gate_of: Any) -> float:
    """Train two batches a process, each beside the gradient of what all processes selected.

    Returns:
        The largest relative error of a gradient.
    """
    torch.manual_seed(0)
    x = torch.randn(SIZE, 5).double()
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    reference = copy.deepcopy(network)
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=BATCH))
    gate = gate_of(fabric)
    worst = 0.0
    for inputs, labels in [*loader][:2]:
        with gate.trace((inputs, labels)):
            loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        gate.open(loss, batch_size=len(inputs))
        fabric.backward(loss)
        kept = gate.selection
        losses = F.cross_entropy(reference(inputs), labels, reduction="none")[kept.indices]
        weights = kept.weights.to(losses)
        total = fabric.all_reduce(weights.sum(), reduce_op="sum")
        reference.zero_grad()
        (losses * weights).sum().div(total).backward()
        for got, own in zip(model.parameters(), reference.parameters(), strict=True):
            want: Tensor = fabric.all_reduce(own.grad, reduce_op="sum")
            worst = max(worst, float((got.grad - want).norm() / want.norm()))
        optimizer.step()
        reference.load_state_dict(network.state_dict())
    return worst


def gate_of(fabric: Fabric) -> GradientGate:
    selector = SampleSelector(target_activation_rate=0.5, rank=fabric.global_rank)
    several = fabric.world_size > 1
    return GradientGate(selector, average=(lambda v: fabric.all_reduce(v, reduce_op="mean")) if several else None)


def test_one_process() -> None:
    assert train(Fabric(accelerator="cpu", devices=1), gate_of) < 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_two_processes_train_as_one_large_batch() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    assert fabric.launch(train, gate_of) < 1e-6
