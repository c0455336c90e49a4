"""Batches in every container that users load, trained in every mode; bad samples in them are really left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ast import SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import BatchError
from tests.helpers.training import BATCH_MODES, StopAfter, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:lightning-ast. NaN or infinity",
    "ignore:lightning-ast. the run ended after",  # within the warmup
    "ignore:lightning-ast. FLOPs are not counted",  # of strided nested tensors
    "ignore:Sparse",
    "ignore:lightning-ast. which rows .*(NestedTensorImpl|no tensor in which)",  # strided nested tensors, arrays
    "ignore:The PyTorch API of nested tensors",
)
SIZE, BATCH, BAD = 18, 8, 3
X = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (SIZE,), generator=torch.Generator().manual_seed(1))


def lengths(indices: list[int]) -> list[int]:
    return [1 + i % 3 for i in indices]


def rows_of(x: Tensor, indices: list[int]) -> list[Tensor]:
    """A sample as a sequence whose mean is the sample."""
    return [x[i].expand(length, 4) for i, length in zip(indices, lengths(indices), strict=True)]


def mean_of(nested: Tensor) -> Tensor:
    return torch.stack([row.mean(0) for row in nested.unbind()])


def tensordict(x: Tensor, rows: list[int], size: list[int]) -> Any:
    return pytest.importorskip("tensordict").TensorDict({"x": x[rows], "y": Y[rows]}, batch_size=size)


Make = Callable[[Tensor, list[int]], Any]
Read = Callable[[Any], tuple[Tensor, Tensor]]
CONTAINERS: dict[str, tuple[Make, Read]] = {
    "list of dicts": (
        lambda x, rows: [{"x": x[i], "y": int(Y[i])} for i in rows],
        lambda b: (torch.stack([s["x"] for s in b]), torch.tensor([s["y"] for s in b])),
    ),
    "list of tuples": (
        lambda x, rows: [(x[i], Y[i]) for i in rows],
        lambda b: (torch.stack([s[0] for s in b]), torch.stack([s[1] for s in b])),
    ),
    "images and targets": (
        lambda x, rows: (rows_of(x, rows), [{"label": Y[i : i + 1], "boxes": torch.ones(i % 4, 4)} for i in rows]),
        lambda b: (torch.stack([image.mean(0) for image in b[0]]), torch.cat([t["label"] for t in b[1]])),
    ),
    "TensorDict": (lambda x, rows: tensordict(x, rows, [len(rows)]), lambda b: (b["x"], b["y"])),
    "TensorDict without size": (lambda x, rows: tensordict(x, rows, []), lambda b: (b["x"], b["y"])),
    "CSR": (lambda x, rows: (x[rows].to_sparse_csr(), Y[rows]), lambda b: (b[0].to_dense(), b[1])),
    "COO": (lambda x, rows: (x[rows].to_sparse(), Y[rows]), lambda b: (b[0].to_dense(), b[1])),
    "strided nested": (
        lambda x, rows: (torch.nested.nested_tensor(rows_of(x, rows)), Y[rows]),
        lambda b: (mean_of(b[0]), b[1]),
    ),
    "jagged": (
        lambda x, rows: (torch.nested.nested_tensor(rows_of(x, rows), layout=torch.jagged), Y[rows]),
        lambda b: (mean_of(b[0]), b[1]),
    ),
    "arrays": (
        lambda x, rows: {"x": x[rows].numpy(), "y": Y[rows].numpy()},
        lambda b: (torch.as_tensor(b["x"]), torch.as_tensor(b["y"])),
    ),
}


class Net(pl.LightningModule):
    def __init__(self, read: Read) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = read
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.read(batch)
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, batch_size=len(y))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def data(make: Make, *, bad: bool) -> DataLoader[Any]:
    x = X.index_fill(0, torch.tensor([BAD]), math.nan) if bad else X
    return DataLoader(range(SIZE), batch_size=BATCH, collate_fn=lambda rows: make(x, rows))


def by_hand(*, bad: bool, sparse: bool) -> Net:
    """An ordinary loop: over all good samples, or over the half of the batch with the largest loss."""
    net = Net(CONTAINERS["CSR"][1])
    optimizer = net.configure_optimizers()
    for start in range(0, SIZE, BATCH):
        rows = [i for i in range(start, min(start + BATCH, SIZE)) if not (bad and i == BAD)]
        losses = F.cross_entropy(net.net(X[rows]), Y[rows], reduction="none")
        if sparse:
            size = min(BATCH, SIZE - start)
            losses = losses.topk(max(2, size // 2)).values
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "bad"])
@pytest.mark.parametrize("sparse", [False, True], ids=["warmup", "sparse"])
@pytest.mark.parametrize("mode", BATCH_MODES)
@pytest.mark.parametrize("kind", CONTAINERS)
def test_trains_as_a_loop_by_hand(kind: str, mode: str, sparse: bool, bad: bool) -> None:
    """The last batch of two samples, and the bad one's own batch, included."""
    make, read = CONTAINERS[kind]
    module = Net(read)
    callback = SparseSelectionCallback(
        mode=mode, gate="topk", significance="loss", target_activation_rate=0.5, quarantine_limit=0.1
    )
    schedule = [] if sparse else [TwoStageScheduler(warmup_epochs=1)]
    fit(module, data(make, bad=bad), callback, *schedule, StopAfter(3), max_epochs=2)
    assert [(s.batch, s.position) for s in callback.quarantined] == ([(0, BAD)] if bad else [])
    reference = by_hand(bad=bad, sparse=sparse)
    for got, want in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert callback.ledger.offered == SIZE


def test_prune_leaves_it_out_too() -> None:
    module = Net(CONTAINERS["list of dicts"][1])
    callback = SparseSelectionCallback(mode="prune", quarantine_limit=0.1)
    make = CONTAINERS["list of dicts"][0]
    fit(module, data(make, bad=True), callback, TwoStageScheduler(warmup_epochs=1), max_epochs=3)
    assert {s.index for s in callback.quarantined} == {BAD}
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_list_of_images_of_several_sizes_is_counted() -> None:
    """Its tensors agree on three channels: the DataLoader's batch size tells that they are not rows."""
    images = [torch.rand(3, 4, 4 + i % 2) for i in range(16)]
    module = Net(lambda batch: (torch.stack([im.mean((0, 2)) for im in batch]), torch.arange(len(batch)) % 3))
    callback = SparseSelectionCallback(mode="mask", target_activation_rate=0.5)
    fit(module, DataLoader(images, batch_size=8, collate_fn=list), callback)
    assert callback.ledger.offered == 16
    assert 0 < callback.ledger.selected < 16


def test_loaders_of_several_batch_sizes_are_named() -> None:
    module = Net(lambda batch: (batch[0][0], batch[0][1]))
    loaders = [DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=size) for size in (4, 8)]
    with pytest.raises(BatchError, match="those of 2 loaders, which differ in size"):
        fit(module, loaders, SparseSelectionCallback(mode="mask"))
    pairs = [DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=2) for _ in range(2)]
    fit(module, pairs, SparseSelectionCallback(target_activation_rate=0.5, min_selected=1), max_steps=2)


class Graphs:
    """As torch_geometric's batch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any, **_: Any) -> Graphs:
        return self


@pytest.mark.parametrize("mode", BATCH_MODES)
def test_what_cannot_be_sliced_is_refused_where_it_has_to_be(mode: str) -> None:
    def make(x: Tensor, rows: list[int]) -> Any:
        return Graphs(x[rows]), Y[rows]

    module, callback = Net(lambda batch: (batch[0].x, batch[1])), SparseSelectionCallback(mode=mode)
    if mode == "subset":
        with (
            pytest.warns(UserWarning, match="type Graphs"),
            pytest.raises(BatchError, match=r"type Graphs in the batch cannot be indexed by samples.*override"),
        ):
            fit(module, data(make, bad=False), callback)
    else:
        with pytest.warns(UserWarning, match="taken from the sizes of tensors: an object of type Graphs"):
            fit(module, data(make, bad=False), callback)
        assert callback.ledger.offered == SIZE
        assert callback.ledger.selected < SIZE


def test_rows_of_a_jagged_tensor_at_the_last_layer_are_gated_behind_it() -> None:
    make, _ = CONTAINERS["jagged"]

    class Flat(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]).to_padded_tensor(0.0).sum(1), batch[1])

    callback = SparseSelectionCallback(mode="mask")
    fit(Flat(lambda batch: batch), data(make, bad=False), callback, max_epochs=2)
    assert 0 < callback.ledger.selected < callback.ledger.offered
