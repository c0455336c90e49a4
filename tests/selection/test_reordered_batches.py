"""Steps that put the samples of a batch into another order are refused, also where the last sample stays the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_ast import SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.core import GradientGate, SampleSelector
from lightning_ast.errors import EntryError
from lightning_ast.testing import check_partial_backward
from tests.helpers.training import MODES, fit

SIZE, BATCH = 48, 16
X = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SIZE) % 3  # the last sample of a batch has the label 0
DOMAIN = torch.arange(SIZE) % BATCH % 5 + torch.arange(SIZE) % BATCH // 15 * 5  # the last one of a batch is the largest

Order = Callable[[Tensor, Tensor], Tensor]


def even_then_odd(labels: Tensor, domains: Tensor) -> Tensor:
    places = torch.arange(len(labels))
    return torch.cat([places[::2], places[1::2]])


def by_domain(labels: Tensor, domains: Tensor) -> Tensor:
    return domains.argsort(stable=True)


def all_but_the_last_backwards(labels: Tensor, domains: Tensor) -> Tensor:
    places = torch.arange(len(labels))
    return torch.cat([places[:-1].roll(1), places[-1:]])


def as_it_is(labels: Tensor, domains: Tensor) -> Tensor:
    return torch.arange(len(labels))


class Net(pl.LightningModule):
    """A classifier whose step may put the samples into another order before the network sees them."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = order
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, domains, *_ = batch
        places = self.order(y, domains)
        return F.cross_entropy(self.net(x[places]), y[places])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(net: Net, mode: str, collate: Any = None) -> SparseSelectionCallback:
    selection = SparseSelectionCallback(mode=mode, target_activation_rate=0.5)  # type: ignore[arg-type]
    loader = DataLoader(TensorDataset(X, Y, DOMAIN, torch.arange(SIZE)), batch_size=BATCH, collate_fn=collate)
    fit(net, loader, selection, TwoStageScheduler(warmup_epochs=1), max_epochs=2)
    return selection


REORDERED = [even_then_odd, by_domain, all_but_the_last_backwards]


def test_the_last_sample_stays_where_it_is() -> None:
    kept = [int(order(Y[:BATCH], DOMAIN[:BATCH])[-1]) == BATCH - 1 for order in REORDERED]
    assert kept == [True, True, True]


@pytest.mark.parametrize("order", REORDERED)
@pytest.mark.parametrize("mode", MODES)
def test_another_order_is_refused_at_the_first_batch(order: Order, mode: str) -> None:
    with pytest.raises(EntryError, match=r"the 16 samples in the order of the batch .* Do that in the collate_fn"):
        trained(Net(order), mode)


class Indexed(SparseLossMixin, Net):
    """Tells the index of each sample, which a collate function may have moved."""

    def sample_indices(self, batch: Any) -> Tensor:
        return batch[3]


def sorted_batch(rows: Any) -> Any:
    batch = default_collate(rows)
    places = by_domain(batch[1], batch[2])
    return [tensor[places] for tensor in batch]


@pytest.mark.parametrize("mode", MODES)
def test_the_same_order_in_the_collate_function_trains(mode: str) -> None:
    selection = trained(Indexed(as_it_is), mode, sorted_batch)
    assert selection.ledger.stages["sparse"].selected > 0


def test_a_plain_loop_and_the_check_of_a_module_refuse_it_too() -> None:
    module = Net(even_then_odd)
    batch = (X[:BATCH], Y[:BATCH], DOMAIN[:BATCH])
    gate = GradientGate(SampleSelector(target_activation_rate=0.5))
    with gate.trace(batch):
        loss = module.training_step(batch, 0)
    with pytest.raises(EntryError, match="in the order of the batch"):
        gate.open(loss, batch_size=BATCH)
    with pytest.raises(EntryError, match="in the order of the batch"):
        check_partial_backward(module, batch, loss=lambda net, rows: net.training_step(rows, 0))


def test_samples_that_follow_those_before_them_keep_their_order() -> None:
    class Running(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, *_ = batch
            return F.cross_entropy(self.net(x + 0.01 * x.cumsum(0)), y)

    selection = SparseSelectionCallback(mode="partial", target_activation_rate=0.5)
    loader = DataLoader(TensorDataset(X, Y, DOMAIN), batch_size=BATCH)
    fit(Running(as_it_is), loader, selection, TwoStageScheduler(warmup_epochs=1), max_epochs=2)
    assert selection.ledger.stages["sparse"].selected > 0


def test_a_sample_that_is_not_finite_says_nothing_of_the_order() -> None:
    x = X.clone()
    x[: BATCH - 1] = torch.nan  # those that may be followed beside the last one
    selection = SparseSelectionCallback(mode="partial", target_activation_rate=0.5, quarantine_limit=1.0)
    loader = DataLoader(TensorDataset(x, Y, DOMAIN), batch_size=BATCH)
    with pytest.warns(UserWarning, match="NaN or infinity"):
        fit(Net(as_it_is), loader, selection, TwoStageScheduler(warmup_epochs=1), max_epochs=2)
    assert selection.ledger.stages["sparse"].selected > 0
