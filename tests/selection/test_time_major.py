"""Batches whose samples do not lie along the first dimension are refused, by sizes or by what a forward shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from lightning_ast import SparseLossMixin, SparseSelectionCallback, TwoStageScheduler
from lightning_ast.errors import BatchError, EntryError
from lightning_ast.lightning_internals.fit_loop import loaded_samples
from tests.helpers.training import BATCH_MODES, MODES, fit

FEATURES = 3


class Series(Dataset[tuple[Tensor, Tensor]]):
    """Sequences ``(time, feature)`` with a class for each step."""

    def __init__(self, length: int, steps: int, features: int = FEATURES) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(length, steps, features, generator=generator)
        self.y = torch.randint(0, 4, (length, steps), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """The same, without a length."""

    def __init__(self, series: Series) -> None:
        self.series = series

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.series[index] for index in range(len(self.series)))


def time_first(rows: Any) -> Any:
    return [torch.stack(each, dim=1) for each in zip(*rows, strict=True)]


class Net(pl.LightningModule):
    """A network over sequences, and a classifier of each step."""

    def __init__(self, body: str = "LSTM", features: int = FEATURES, *, batch_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = body in ("LSTM", "GRU")
        if body == "GRU":
            self.body: nn.Module = nn.GRU(features, 4, bidirectional=True, batch_first=batch_first)
        elif body == "LSTM":
            self.body = nn.LSTM(features, 8, batch_first=batch_first)
        elif body == "attention":
            width = nn.Linear(features, 8)
            self.body = nn.Sequential(width, nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=batch_first))
        else:
            self.body = nn.Linear(features, 8)
        self.head = nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[:2]
        hidden = self.body(x)
        logits = self.head(hidden[0] if self.recurrent else hidden)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


pytestmark = [
    pytest.mark.filterwarnings("ignore:lightning-ast. in mode='partial' these backward operations"),
    pytest.mark.filterwarnings("ignore:lightning-ast. min_selected keeps"),
]


def train(module: pl.LightningModule, data: Any, mode: str = "partial", **options: Any) -> SparseSelectionCallback:
    selection = SparseSelectionCallback(target_activation_rate=0.5, mode=mode, count_flops=False)  # type: ignore[arg-type]
    warmup = TwoStageScheduler(warmup_epochs=1)
    fit(module, data, selection, warmup, max_epochs=2, limit_train_batches=2, **options)
    return selection


def loader(steps: int, size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(Series(3 * size, steps), **{"batch_size": size, "collate_fn": time_first, **options})


@pytest.mark.parametrize("body", ["LSTM", "GRU", "attention", "pointwise"])
@pytest.mark.parametrize("mode", MODES)
def test_another_number_than_the_loader_says_is_refused(mode: str, body: str) -> None:
    with pytest.raises(BatchError, match=r"puts 8 samples into this batch; the first dimension, of 5,") as error:
        train(Net(body), loader(5), mode)
    assert "(5, 8, 3), (5, 8) they lie along the dimension of size 8" in str(error.value)
    for remedy in ("batch_first=True", "count_samples(batch)", "select_batch(batch, indices)"):
        assert remedy in str(error.value)


LOADERS: dict[str, Callable[[], Any]] = {
    "batch sampler": lambda: DataLoader(
        data := Series(24, 5), batch_sampler=BatchSampler(SequentialSampler(data), 8, False), collate_fn=time_first
    ),
    "iterable": lambda: DataLoader(Stream(Series(24, 5)), batch_size=8, collate_fn=time_first),
    "fewer samples than a batch": lambda: DataLoader(Series(6, 5), batch_size=8, collate_fn=time_first),
    "drop_last": lambda: loader(5, drop_last=True),
    "two loaders": lambda: [loader(5), loader(5)],
}


@pytest.mark.parametrize("name", LOADERS)
def test_whatever_tells_the_number(name: str) -> None:
    class First(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[0], batch_idx)

    module = (First if name == "two loaders" else Net)("pointwise")
    with pytest.raises(BatchError, match=r"puts [68] samples into this batch; the first dimension, of 5,"):
        train(module, LOADERS[name]())


def test_a_transfer_hook_that_swaps_the_dimensions() -> None:
    class Swapped(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [each.transpose(0, 1).contiguous() for each in batch]

    with pytest.raises(BatchError, match="puts 8 samples into this batch"):
        train(Swapped(), loader(5, collate_fn=None))


@pytest.mark.parametrize("body", ["LSTM", "GRU", "attention"])
@pytest.mark.parametrize("steps", [8, 16], ids=["as many", "a multiple"])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_where_sizes_do_not_tell_the_forward_does(mode: str, steps: int, body: str) -> None:
    with pytest.raises(EntryError, match="the dimension of size 8: the DataLoader puts 8"):
        train(Net(body), loader(steps), mode)


@pytest.mark.parametrize("steps", [5, 8, 16])
def test_samples_in_the_last_dimension(steps: int) -> None:
    class Last(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch[0].transpose(1, 2), batch[1]], batch_idx)

    with pytest.raises(EntryError, match="the dimension of size 8: the DataLoader puts 8"):
        train(Last(), loader(steps, collate_fn=time_first_sample_last))


@pytest.mark.parametrize("steps", [5, 8])
@pytest.mark.parametrize("mode", BATCH_MODES)
def test_a_label_for_each_sequence(mode: str, steps: int) -> None:
    class ManyToOne(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.head(self.body(batch[0])[0][-1]), batch[1])

    def collate(rows: Any) -> Any:
        x, y = time_first(rows)
        return [x, y[0]]

    with pytest.raises(EntryError, match=r"expected (a batch of 8 samples|the samples along the first dimension)"):
        train(ManyToOne(), loader(steps, collate_fn=collate), mode)


def test_prune_of_as_many_steps() -> None:
    with pytest.raises(EntryError, match="the dimension of size 8"):
        train(Net(), loader(8), "prune")


def ready(steps: int = 5) -> list[Any]:
    """Batches that no loader has put together."""
    series = Series(24, steps)
    return [time_first([series[i] for i in range(start, start + 8)]) for start in (0, 8, 16)]


class Batches:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(ready())


def time_first_sample_last(rows: Any) -> Any:
    x, y = zip(*rows, strict=True)
    return [torch.stack(x, dim=2), torch.stack(y, dim=1)]


def with_times(rows: Any) -> Any:
    return [*time_first(rows), torch.arange(float(len(rows[0][0])))]


FORWARD_TELLS: dict[str, Callable[[], Any]] = {
    "batch_size=None": lambda: DataLoader(ready(), batch_size=None),  # type: ignore[arg-type]
    "no DataLoader": Batches,
    "times beside them": lambda: loader(5, collate_fn=with_times),
    "one sample": lambda: loader(5, size=1),
}


@pytest.mark.parametrize("name", FORWARD_TELLS)
def test_where_no_loader_tells_the_forward_does(name: str) -> None:
    with pytest.raises(EntryError, match=r"in .* they lie along the dimension of size"):
        train(Net(), FORWARD_TELLS[name]())


def test_with_the_two_methods_it_is_trained() -> None:
    class Told(SparseLossMixin, Net):
        def count_samples(self, batch: Any) -> int:
            return batch[0].shape[1]

        def select_batch(self, batch: Any, indices: Tensor) -> Any:
            return [each[:, indices] for each in batch]

    for mode in BATCH_MODES:
        assert train(Told(), loader(5), mode).ledger.offered == 4 * 8


# ---------------------------------------------------------------------- what goes on as before


class Rows(pl.LightningModule):
    """A network over rows, with the loss of an autoencoder."""

    def __init__(self, features: int, *, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(8)] if norm else []
        self.net = nn.Sequential(nn.Linear(features, 8), *norms, nn.ReLU(), nn.Linear(8, features))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] if isinstance(batch, list) else batch
        return F.mse_loss(self.net(x), x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(*shape: int) -> list[Tensor]:
    return list(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def two_views(samples: list[Tensor]) -> Tensor:
    return torch.cat([torch.stack(samples), torch.stack(samples) + 0.1])


def without_one(samples: list[Tensor]) -> list[Tensor]:
    kept = torch.stack(samples[1:])
    return [kept, kept[:, 0]]


GO_ON: dict[str, tuple[Callable[[], Any], int]] = {
    "as wide as a batch": (lambda: DataLoader(rows(16, 8), batch_size=8), 8),  # type: ignore[arg-type]
    "two views, as wide": (lambda: DataLoader(rows(16, 8), batch_size=8, collate_fn=two_views), 16),  # type: ignore[arg-type]
    "one is dropped, as wide": (lambda: DataLoader(rows(16, 8), batch_size=8, collate_fn=without_one), 7),  # type: ignore[arg-type]
    "a short batch, as wide": (lambda: DataLoader(rows(3, 8), batch_size=8), 3),  # type: ignore[arg-type]
    "whole batches": (lambda: DataLoader([torch.stack(rows(16, 8))] * 2, batch_size=None), 16),  # type: ignore[arg-type]
    "whole batches in one": (
        lambda: DataLoader([torch.stack(rows(16, 8))] * 2, batch_size=1, collate_fn=lambda b: b[0]),  # type: ignore[arg-type]
        16,
    ),
}


@pytest.mark.parametrize("name", GO_ON)
def test_these_go_on_as_before(name: str) -> None:
    make, counted = GO_ON[name]
    selection = train(Rows(8), make())
    assert selection.ledger.offered % counted == 0
    assert 0 < selection.ledger.selected < selection.ledger.offered


@pytest.mark.filterwarnings("ignore:lightning-ast. the network mixes the samples")
def test_batchnorm_is_no_sign_of_another_dimension() -> None:
    assert train(Rows(8, norm=True), DataLoader(rows(16, 8), batch_size=8)).ledger.offered == 32  # type: ignore[arg-type]


@pytest.mark.parametrize("body", ["LSTM", "attention"])
def test_batch_first_of_as_many_steps(body: str) -> None:
    data = loader(8, collate_fn=None)
    assert train(Net(body, batch_first=True), data).ledger.offered == 32


class Told(pl.Callback):
    """Records what the loaders are said to put into each batch."""

    def __init__(self) -> None:
        self.samples: list[int | None] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.samples.append(loaded_samples(trainer))


def sampled(drop_last: bool) -> DataLoader[Any]:
    data = rows(11, 8)
    return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 8, drop_last))  # type: ignore[arg-type]


SAID: dict[str, tuple[Callable[[], Any], list[int | None]]] = {
    "a shorter last batch": (lambda: DataLoader(rows(11, 8), batch_size=8), [8, 3]),  # type: ignore[arg-type]
    "drop_last": (lambda: DataLoader(rows(11, 8), batch_size=8, drop_last=True), [8]),  # type: ignore[arg-type]
    "batch sampler": (lambda: sampled(False), [8, 3]),
    "batch sampler, drop_last": (lambda: sampled(True), [8]),
    "iterable": (lambda: DataLoader(Stream(Series(11, 5)), batch_size=8, collate_fn=time_first), [8, None]),
    "batch_size=None": (lambda: DataLoader(ready(), batch_size=None), [None] * 3),  # type: ignore[arg-type]
    "two alike": (lambda: [loader(5), loader(5)], [8] * 3),
    "two that differ": (lambda: [loader(5), loader(5, size=4)], [None] * 3),
    "no DataLoader": (Batches, [None] * 3),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_loader_says_of_each_batch(name: str) -> None:
    class Nothing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.head.bias.sum()

    make, want = SAID[name]
    told = Told()
    fit(Nothing(), make(), told)
    assert told.samples == want
