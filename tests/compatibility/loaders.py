"""The kinds of loaders: what each mode makes of them. The tests train with them, and the page on data shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from lightning_ast.streams import BlockShuffle, IndexedStream, SampleFilter
from tests.pruning.own_batch_samplers import Grouped
from tests.pruning.prune_by_hand import Indexed

__all__ = ["KINDS", "Kind", "markdown"]

SIZE = 96


class Stream(IterableDataset[Any]):
    """Digits one after the other; those that a filter passes."""

    def __init__(self, sample_filter: SampleFilter | None = None, *, endless: bool = False) -> None:
        self.images = Indexed(SIZE)
        self.passes: Callable[[int], bool] = sample_filter or (lambda _: True)
        self.endless = endless

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        while True:
            yield from (self.images[index] for index in range(SIZE) if self.passes(index))
            if not self.endless:
                return


class StreamWithIndex(Stream):
    """A stream that also gives a sample by its index."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.images[index]


class ReadyBatches(Indexed):
    """A dataset of batches of 8 digits."""

    def __len__(self) -> int:
        return SIZE // 8

    def __getitem__(self, number: int) -> Any:
        rows = slice(8 * number, 8 * number + 8)
        return self.x[rows], self.y[rows], torch.arange(8 * number, 8 * number + 8)


class OwnOrder(DataLoader[Any]):
    """A loader that iterates in a way of its own."""

    def __iter__(self) -> Any:
        return iter(sorted(super().__iter__(), key=lambda batch: float(batch[0].sum())))


def reversed_batch(samples: list[Any]) -> Any:
    """Collate a batch the other way about."""
    return torch.utils.data.default_collate(samples[::-1])


def without_first(samples: list[Any]) -> Any:
    """Collate a batch and drop a sample."""
    return torch.utils.data.default_collate(samples[1:])


def plain(**options: Any) -> DataLoader[Any]:
    """Make an ordinary loader."""
    return DataLoader(Indexed(SIZE), **{"batch_size": 16, **options})


def filtered() -> tuple[DataLoader[Any], dict[str, Any]]:
    """Make a stream with a filter in it, and the callback's settings for it."""
    sample_filter = SampleFilter(size=SIZE)
    return DataLoader(Stream(sample_filter), batch_size=16), {"sample_filter": sample_filter}


def of_stream() -> DataLoader[Any]:
    """Make a loader of a stream that has an index."""
    dataset = IndexedStream(StreamWithIndex())
    return DataLoader(dataset, batch_size=16, sampler=BlockShuffle(dataset, block_size=12))


def grouped() -> DataLoader[Any]:
    """Make a loader with a batch sampler of its own."""
    images = Indexed(SIZE)
    groups = [index % 3 for index in range(SIZE)]
    return DataLoader(images, batch_sampler=Grouped(RandomSampler(images), groups, 8))


def several() -> CombinedLoader:
    """Make two loaders of full batches."""
    loaders = {"a": plain(drop_last=True), "b": plain(batch_size=12, drop_last=True)}
    return CombinedLoader(loaders, "min_size")


def made_of_batches() -> DataLoader[Any]:
    """Make a loader whose sampler draws batches."""
    images = Indexed(SIZE)
    return DataLoader(images, batch_sampler=BatchSampler(RandomSampler(images), 16, drop_last=True))


@dataclass(frozen=True)
class Kind:
    """One kind of loader.

    Attributes:
        text: What it is, for readers.
        in_batch: What `partial`, `mask` and `subset` make of it, for readers.
        prune: What `prune` makes of it, for readers.
        make: Makes loaders of that kind, with the callback's settings where it needs some.
        refused: A part of the message where `prune` refuses them; None where it trains.
        tells_indices: Whether the module tells which samples a batch holds.
    """

    text: str
    in_batch: str
    prune: str
    make: tuple[Callable[[], Any], ...]
    refused: str | None = None
    tells_indices: bool = True


KINDS = (
    Kind("torch `DataLoader` over a map-style dataset", "yes", "yes", (plain, made_of_batches)),
    Kind(
        "any sampler with a length: shuffled, weighted, with replacement, distributed, your own",
        "yes",
        "yes",
        (
            lambda: plain(shuffle=True),
            lambda: plain(sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)),
            lambda: plain(sampler=list(range(0, SIZE, 2))),
        ),
    ),
    Kind(
        "a stream that has an index: LitData's, MosaicML's `StreamingDataset`",
        "yes",
        "yes, in an [`IndexedStream`](#streams-with-an-index)",
        (of_stream,),
    ),
    Kind(
        "a stream without an index: WebDataset, an `IterableDataset` of Hugging Face or of your own",
        "yes",
        "where each sample has a number, with a [`SampleFilter`](#streams-without-an-index)",
        (filtered,),
    ),
    Kind(
        "an endless stream",
        "yes",
        "refused",
        (lambda: DataLoader(Stream(endless=True), batch_size=16),),
        refused="sample_filter|SampleFilter",
    ),
    Kind(
        "Hugging Face `datasets` with an index",
        "yes",
        "yes, in [torch format](#hugging-face-datasets)",
        (),  # the package is not installed for every run of the tests: tests/third_party/test_streams.py
    ),
    Kind("your own [batch sampler](#batch-samplers-of-your-own)", "yes", "yes: its groups are kept", (grouped,)),
    Kind(
        "`batch_size=None`: the dataset makes the [batches](#ready-batches)",
        "yes, where the batch shows how many samples it has",
        "yes: each batch counts as one sample",
        (lambda: DataLoader(ReadyBatches(SIZE), batch_size=None, shuffle=True),),
        tells_indices=False,
    ),
    Kind(
        "several loaders at once",
        "with equal batch sizes; see [below](#several-loaders)",
        "each by its own samples, [with full batches](#prune-with-several-loaders)",
        (several,),
        tells_indices=False,
    ),
    Kind(
        "torchdata's `StatefulDataLoader`",
        "yes; needed to resume in the middle of an epoch",
        "yes, [not needed](#loaders-that-save-their-position)",
        (),  # tests/pruning/test_stateful_loaders.py
    ),
    Kind(
        "`in_order=False`, a loader with its own `__iter__`",
        "yes",
        "refused",
        (lambda: OwnOrder(Indexed(SIZE), batch_size=16),),
        refused="iterates in a way of its own",
    ),
    Kind(
        "a `collate_fn` that drops or adds samples",
        "yes",
        "refused at the first batch where it does so",
        (lambda: plain(collate_fn=without_first),),
        refused="were drawn for it",
        tells_indices=False,
    ),
    Kind(
        "a `collate_fn` that changes the order within a batch",
        "yes",
        "needs [`sample_indices`](#the-order-within-a-batch)",
        (lambda: plain(collate_fn=reversed_batch),),
    ),
    Kind(
        "workers, persistent workers",
        "yes",
        "yes",
        (lambda: plain(num_workers=1), lambda: plain(num_workers=1, persistent_workers=True)),
    ),
    Kind(
        "each process has a [part of the data of its own](processes.md#a-part-of-the-data-in-each-process)",
        "yes",
        "yes, with `own_parts=True`",
        (),  # tests/pruning/test_own_parts.py
    ),
    Kind(
        "`reload_dataloaders_every_n_epochs`",
        "yes",
        "yes, if the new loader has the same samples in the same order",
        (),  # tests/pruning/test_loaders.py
    ),
)


def markdown() -> str:
    """Return the table for readers."""
    lines = ["| your data | `partial`, `mask`, `subset` | `prune` |", "|---|---|---|"]
    lines += [f"| {kind.text} | {kind.in_batch} | {kind.prune} |" for kind in KINDS]
    return "\n".join(lines)
