"""Batches of graphs, as torch_geometric's: a graph is a sample, and its rows are nodes or edges."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import GradientGate, SampleSelector
from tests.helpers.modules import Trained
from tests.helpers.training import assert_close_weights, fit, weights

SIZE = 8
pytestmark = pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations")


class Graphs:
    """Graphs joined into one, each with a ring of edges or a few more."""

    def __init__(self, graphs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        nodes = torch.tensor([len(x) for x, _, _ in graphs])
        starts = nodes.cumsum(0) - nodes
        self._graphs = graphs
        self.num_graphs = len(graphs)
        self.batch = torch.arange(len(graphs)).repeat_interleave(nodes)
        self.x = torch.cat([x for x, _, _ in graphs])
        self.edge_index = torch.cat([e + start for (_, e, _), start in zip(graphs, starts, strict=True)], 1)
        self.y = torch.cat([y for _, _, y in graphs])

    @classmethod
    def from_data_list(cls, graphs: list[tuple[Tensor, Tensor, Tensor]]) -> Graphs:
        return cls(graphs)

    def index_select(self, indices: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [self._graphs[i] for i in indices.tolist()]

    def to(self, device: Any, **_: Any) -> Graphs:
        return self


class Closed:
    """Graphs that cannot be taken apart."""

    def __init__(self, graphs: Graphs) -> None:
        self.__dict__.update({name: value for name, value in vars(graphs).items() if name != "_graphs"})

    def to(self, device: Any, **_: Any) -> Closed:
        return self


def graphs(number: int, *, nodes: int | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    found = []
    for i in range(number):
        count = 2 + i % 4 if nodes is None else nodes
        ring = torch.arange(count)
        edges = torch.stack([ring, ring.roll(1)])
        edges = torch.cat([edges, edges.flip(0)[:, : i % 3]], 1)
        found.append((torch.randn(count, 4), edges, torch.tensor([i % 3])))
    return found


class Network(Trained):
    """One step of message passing; the loss is one of graphs, of nodes or of edges."""

    lr = 1.0

    def __init__(self, rows: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.rows = rows

    def losses(self, batch: Any) -> Tensor:
        graphs = batch if hasattr(batch, "num_graphs") else batch[0]
        source, target = graphs.edge_index
        h = self.first(graphs.x).tanh()
        h = h.index_add(0, target, h[source])
        if self.rows == "graphs":
            h = h.new_zeros(graphs.num_graphs, 8).index_add(0, graphs.batch, h)
            return F.cross_entropy(self.head(h), batch[1] if graphs is not batch else graphs.y, reduction="none")
        return self.head(h if self.rows == "nodes" else h[source] * h[target]).square().mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()


def owners(rows: str, batch: Graphs) -> Tensor:
    """The graph of each row."""
    nodes = batch.batch
    return {"graphs": torch.arange(batch.num_graphs), "nodes": nodes, "edges": nodes[batch.edge_index[0]]}[rows]


def loader(data: list[Any], **options: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=SIZE, **{"collate_fn": Graphs, **options})


def callback(mode: str, **options: Any) -> SparseSelectionCallback:
    return SparseSelectionCallback(**{"mode": mode, "gate": "topk", "target_activation_rate": 0.5, **options})


@pytest.mark.parametrize("nodes", [None, 3], ids=["unequal", "equal"])
@pytest.mark.parametrize("mode", ["mask", "partial", "subset"])
@pytest.mark.parametrize("rows", ["graphs", "nodes", "edges"])
def test_the_selected_graphs_alone_are_trained_on(rows: str, mode: str, nodes: int | None) -> None:
    module, reference = Network(rows), Network(rows)
    data = graphs(SIZE, nodes=nodes)
    used = callback(mode)
    fit(module, loader(data), used, max_steps=1)
    kept = used.last_selection.indices
    assert len(kept) == SIZE // 2
    batch = Graphs(data)
    losses = reference.losses(batch)
    own = torch.isin(owners(rows, batch), kept)
    divisor = own.sum() if mode == "subset" else len(losses) / 2  # the step's own mean, or half of the batch
    (losses[own].sum() / divisor).backward()
    reference.configure_optimizers().step()
    assert_close_weights(weights(module), weights(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", ["graphs", "nodes", "edges"])
def test_batches_of_other_sizes(rows: str) -> None:
    """The second batch has other numbers of nodes and edges: each row is still that of its graph."""
    module, reference = Network(rows), Network(rows)
    data = graphs(2 * SIZE + 3)[3:]
    used = callback("mask")
    optimizer = reference.configure_optimizers()
    chosen: list[Tensor] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            chosen.append(used.last_selection.indices)

    fit(module, loader(data), used, Spy(), max_steps=2)
    for start, kept in zip((0, SIZE), chosen, strict=True):
        batch = Graphs(data[start : start + SIZE])
        optimizer.zero_grad()
        losses = reference.losses(batch)
        (losses[torch.isin(owners(rows, batch), kept)].sum() / (len(losses) / 2)).backward()
        optimizer.step()
    assert_close_weights(weights(module), weights(reference), rtol=1e-4, atol=1e-5)


def test_graphs_are_remembered_in_prune() -> None:
    used = callback("prune")
    fit(Network("nodes"), loader(graphs(4 * SIZE)), used, TwoStageScheduler(warmup_epochs=1), max_epochs=2)
    assert used.ledger.selected == 4 * SIZE + 2 * SIZE


@pytest.mark.parametrize("mode", ["mask", "subset"])
def test_graphs_beside_their_labels(mode: str) -> None:
    module, reference = Network("graphs"), Network("graphs")
    data = graphs(SIZE)
    used = callback(mode)
    fit(module, loader(data, collate_fn=lambda own: (Graphs(own), Graphs(own).y)), used, max_steps=1)
    kept = used.last_selection.indices
    reference.losses(Graphs(data))[kept].mean().backward()
    reference.configure_optimizers().step()
    assert_close_weights(weights(module), weights(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["mask", "partial"])
def test_graphs_that_cannot_be_taken_apart(mode: str) -> None:
    used = callback(mode)
    fit(Network("nodes"), loader(graphs(SIZE), collate_fn=lambda own: Closed(Graphs(own))), used, max_steps=1)
    assert used.last_selection.indices.numel() == SIZE // 2


def test_plain_loop() -> None:
    net, reference = Network("edges"), Network("edges")
    gate = GradientGate(SampleSelector(target_activation_rate=0.5, gate="topk"), execution="mask")
    data = graphs(2 * SIZE + 3)[3:]
    for start in (0, SIZE):
        batch = Graphs(data[start : start + SIZE])
        for module in (net, reference):
            module.zero_grad()
        with gate.trace(batch):
            loss = net.losses(batch).mean()
        gate.open(loss, batch_size=SIZE)
        loss.backward()
        losses = reference.losses(batch)
        own = torch.isin(owners("edges", batch), gate.selection.indices)
        (losses[own].sum() / (len(losses) / 2)).backward()
        for got, want in zip(net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-5)
