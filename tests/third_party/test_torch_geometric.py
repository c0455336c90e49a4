"""torch_geometric: graph batches from LightningDataset, in a module as in its examples."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.third_party.outcomes import Outcome
from tests.third_party.trained import Case, check_outcome, rows

pytest.importorskip("torch_geometric")
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.nn import GIN, MLP, global_add_pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
]


class GraphClassifier(pl.LightningModule):
    """torch_geometric/examples/pytorch_lightning/gin.py."""

    def __init__(self) -> None:
        super().__init__()
        self.gnn = GIN(8, 16, 2, dropout=0.0, jk="cat")
        self.classifier = MLP([16, 16, 3], norm=None, dropout=0.0)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.classifier(global_add_pool(self.gnn(x, edge_index), batch))

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(data.x, data.edge_index, data.batch), data.y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class NodeClassifier(GraphClassifier):
    """A class for each node, as the examples on PPI have it: the rows of a graph are its nodes."""

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.classifier(self.gnn(data.x, data.edge_index)), data.kind)


class EdgeScorer(GraphClassifier):
    """A score for each edge, of its nodes."""

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        nodes = self.gnn(data.x, data.edge_index)
        source, target = data.edge_index
        return self.classifier(nodes[source] * nodes[target]).square().mean()


def graphs() -> Any:
    found = []
    for i in range(256):
        nodes = 3 + i % 5
        ring = torch.arange(nodes)
        edges = torch.stack([ring, ring.roll(1)])
        found.append(Data(x=torch.randn(nodes, 8), edge_index=edges, y=torch.tensor([i % 3]), kind=ring % 3))
    return found


def graph_loader() -> Any:
    return LightningDataset(graphs(), batch_size=32, num_workers=0, pin_memory=False).train_dataloader()


CASES = {
    "GIN": Case(GraphClassifier, graph_loader),
    "GIN, nodes": Case(NodeClassifier, graph_loader),
    "GIN, edges": Case(EdgeScorer, graph_loader),
}


@rows("torch-geometric")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)
