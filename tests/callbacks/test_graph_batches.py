"""Batches of graphs: a sample is a graph, and what the gradient enters by may be its nodes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback
from lightning_ast.core import select_batch
from tests.third_party.trained import QUIET

GRAPHS = 8


class Graphs:
    """As torch_geometric's batches look: nodes of all graphs, and the graph of each."""

    def __init__(self, graphs: list[tuple[Tensor, Tensor]]) -> None:
        self.graphs = graphs
        self.x, self.y = (torch.cat(part) for part in zip(*graphs))
        counts = torch.tensor([len(x) for x, _ in graphs])
        self.batch = torch.arange(len(graphs)).repeat_interleave(counts)
        self.num_graphs = len(graphs)

    @classmethod
    def from_data_list(cls, graphs: list[tuple[Tensor, Tensor]]) -> Graphs:
        return cls(graphs)

    def index_select(self, indices: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [self.graphs[int(i)] for i in indices]

    def to_dict(self) -> dict[str, Any]:
        return {"x": self.x, "y": self.y, "batch": self.batch}

    def to(self, *_: Any, **__: Any) -> Graphs:
        return self


def graphs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [1 + i % 3 for i in range(GRAPHS)]
    return [(torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


class Nodes(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.gradient: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch.x), batch.y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_after_backward(self) -> None:
        self.gradient = [p.grad.clone() for p in self.parameters()]


@pytest.mark.parametrize("mode", ["mask", "subset", "partial"])
@pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations")
@pytest.mark.filterwarnings("ignore:lightning-ast. mode=.* at an activation rate")
def test_the_nodes_of_the_selected_graphs_are_trained_on(mode: Any) -> None:
    torch.manual_seed(0)
    module = Nodes()
    weights = {name: p.clone() for name, p in module.state_dict().items()}
    callback = SparseSelectionCallback(mode=mode, target_activation_rate=0.5, gate="topk")
    trainer = pl.Trainer(**QUIET, max_steps=1, callbacks=[callback])
    trainer.fit(module, DataLoader(graphs(), GRAPHS, collate_fn=Graphs))
    selection = callback.last_selection
    assert selection is not None
    assert selection.indices.numel() == GRAPHS // 2
    oracle = Nodes()
    oracle.load_state_dict(weights)
    batch = Graphs(graphs())
    losses = F.cross_entropy(oracle.net(batch.x), batch.y, reduction="none")
    factors = torch.zeros(GRAPHS).index_fill(0, selection.indices, 2.0)
    (losses * factors[batch.batch]).mean().backward()
    for found, parameter in zip(module.gradient, oracle.parameters()):
        torch.testing.assert_close(found, parameter.grad)


def test_graphs_are_taken_out_of_a_batch_and_of_what_holds_one() -> None:
    labels = torch.arange(GRAPHS)
    taken, kept = select_batch((Graphs(graphs()), labels), torch.tensor([2, 5]))
    assert taken.num_graphs == 2
    assert kept.tolist() == [2, 5]
