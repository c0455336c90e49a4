"""torch_geometric: graph batches from LightningDataset, in a module as in its examples."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ast import SparseLossMixin
from tests.third_party.outcomes import Outcome
from tests.third_party.trained import MODES, Case, check_outcome, check_same_gradients, check_trained, rows

pytest.importorskip("torch_geometric")
from torch_geometric.data import Batch, Data
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


class SparseGraphClassifier(SparseLossMixin, GraphClassifier):
    """The remedy that the refusal names."""

    def count_samples(self, batch: Any) -> int:
        return batch.num_graphs

    def select_batch(self, batch: Any, indices: Tensor) -> Any:
        return Batch.from_data_list(batch.index_select(indices))


def graphs() -> Any:
    found = []
    for i in range(256):
        nodes = 3 + i % 5
        ring = torch.arange(nodes)
        edges = torch.stack([ring, ring.roll(1)])
        found.append(Data(x=torch.randn(nodes, 8), edge_index=edges, y=torch.tensor([i % 3])))
    return found


def graph_loader() -> Any:
    return LightningDataset(graphs(), batch_size=32, num_workers=0, pin_memory=False).train_dataloader()


CASES = {
    "GIN": Case(GraphClassifier, graph_loader),
}


@rows("torch-geometric")
def test_outcome(row: Outcome, mode: str) -> None:
    check_outcome(CASES[row.module], row, mode)


REMEDIES = {"GIN": Case(SparseGraphClassifier, graph_loader)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("module", sorted(REMEDIES))
def test_the_remedy_that_the_refusal_names_works(module: str, mode: str) -> None:
    check_trained(REMEDIES[module], mode)
    if mode in ("subset", "partial"):
        check_same_gradients(REMEDIES[module], mode)
