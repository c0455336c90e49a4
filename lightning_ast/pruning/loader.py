"""The user's DataLoader in mode ``prune``: what can be pruned, and a stand-in for its BatchSampler."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, SupportsIndex, TypeAlias

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.leading import copied_loader, lend_iterator, same_mode
from lightning_ast.lightning_internals.resuming import knows_its_place
from lightning_ast.streams import IndexedStream
from lightning_ast.words import counted

__all__ = [
    "Drawn",
    "LoaderFacts",
    "PrunedBatches",
    "PrunedLoader",
    "draw",
    "faults_of_loader",
    "loader_faults",
    "loader_generators",
    "set_states",
]

Drawn: TypeAlias = Iterable[SupportsIndex]  # a sampler as the user has it: it may yield numbers of numpy or torch


def loader_faults(combined: CombinedLoader, *, processes: int) -> list[str]:
    """Find why the training data cannot be pruned."""
    if len(combined.flattened) != 1:
        return [f"mode='prune' is measured with one training dataloader, got {len(combined.flattened)}."]
    return faults_of_loader(combined.flattened[0], processes=processes)


def faults_of_loader(loader: Any, *, processes: int) -> list[str]:
    """Find why a training dataloader cannot be pruned."""
    if not isinstance(loader, DataLoader):
        return [f"mode='prune' needs a torch DataLoader, got {type(loader).__name__}: nothing tells what it will load."]
    if isinstance(loader.dataset, IterableDataset):
        return [_stream_fault(loader.dataset)]
    if loader.batch_sampler is None:
        return ["mode='prune' needs batch_size: with batch_size=None the dataset makes the batches, not the samples."]
    return _sampling_faults(loader, processes)


def _stream_fault(stream: IterableDataset[Any]) -> str:
    name = type(stream).__name__
    found = "mode='prune' has to skip a sample before it is loaded, and a stream has no order that is known: "
    if IndexedStream.fits(stream):
        return f"{found}{name} has an index: wrap it, IndexedStream(dataset) of lightning_ast.streams."
    return (
        f"{found}where each sample of {name} has a number of its own, put a SampleFilter of lightning_ast.streams in "
        "front of what decodes, and give it to the callback as sample_filter=. Else use mode='partial' or 'subset'."
    )


def _sampling_faults(loader: DataLoader[Any], processes: int) -> list[str]:
    found = []
    if type(loader.batch_sampler) is not BatchSampler:
        found.append(
            f"mode='prune' needs torch's own BatchSampler, got {type(loader.batch_sampler).__name__}: a batch sampler "
            "that groups samples by a rule of its own cannot be told from outside which to leave out. Use batch_size= "
            "and sampler=."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        found.append(
            f"{type(loader).__name__} iterates in a way of its own, which may change the order of the batches: "
            "mode='prune' needs torch's DataLoader.__iter__."
        )
    if not getattr(loader, "in_order", True):
        found.append("mode='prune' needs in_order=True: else batches arrive in an order that nobody knows.")
    if knows_its_place(loader):
        found.append(
            f"{type(loader).__name__} restores its own position when a run is resumed, and mode='prune' does so too: "
            "use torch's DataLoader."
        )
    for name, part in (("dataset", loader.dataset), ("sampler", getattr(loader.batch_sampler, "sampler", None))):
        if not hasattr(part, "__len__"):
            found.append(f"mode='prune' needs to know how many samples there are: the {name} has no __len__.")
    if processes > 1 and not isinstance(getattr(loader.batch_sampler, "sampler", None), DistributedSampler):
        found.append(
            "mode='prune' with several processes needs a DistributedSampler, so that an index means the same sample in "
            "all of them: leave Trainer(use_distributed_sampler=True), or pass one."
        )
    return found


@dataclass(frozen=True)
class LoaderFacts:
    """Lengths of a dense epoch in one process."""

    dataset_size: int
    draws: int  # samples that the user's sampler yields
    batch_size: int
    drop_last: bool
    batches: int  # limit_train_batches included

    @classmethod
    def of(cls, combined: CombinedLoader) -> LoaderFacts:
        """Read the lengths from a single loader without faults."""
        return cls.of_loader(combined.flattened[0], *(combined.limits or ()))

    @classmethod
    def of_loader(cls, loader: DataLoader[Any], limit: float = math.inf) -> LoaderFacts:
        """Read the lengths from one of several loaders; a limit of the run leaves some batches out."""
        sampler: Any = loader.batch_sampler
        return cls(
            dataset_size=len(loader.dataset),  # type: ignore[arg-type]
            draws=len(sampler.sampler),
            batch_size=sampler.batch_size,
            drop_last=sampler.drop_last,
            batches=int(min(len(loader), limit)),
        )

    @property
    def offered(self) -> int:
        """Count the samples that a dense epoch trains on."""
        return min(self.draws, self.batches * self.batch_size)


class PrunedBatches(BatchSampler):
    """A stand-in for the user's BatchSampler; what it yields is decided elsewhere."""

    def __init__(
        self, given: BatchSampler, *, batches: Callable[[Drawn], Iterator[list[int]]], count: Callable[[], int]
    ) -> None:
        super().__init__(given.sampler, given.batch_size, given.drop_last)
        self._batches = batches
        self._count = count

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._batches(self.sampler)

    def __len__(self) -> int:
        return self._count()


class PrunedLoader(CombinedLoader):
    """The user's loader with another sampler under its batches; theirs is left alone, with all that it holds."""

    def __init__(self, given: CombinedLoader, make: Callable[[int, BatchSampler], PrunedBatches]) -> None:
        # `trainer.train_dataloader` gives what is passed here: the user's own loader.
        super().__init__(given.iterables, same_mode(given))
        self.given = given
        self.flattened = [
            copied_loader(loader, batch_sampler=make(number, loader.batch_sampler))
            for number, loader in enumerate(given.flattened)
        ]

    def __iter__(self) -> PrunedLoader:
        """Start the loader, and lend its iterator to the user's, which Lightning asks for the length of an epoch."""
        super().__iter__()
        lend_iterator(self.given, self)
        return self

    def reset(self) -> None:
        """Stop the workers."""
        super().reset()
        lend_iterator(self.given, None)


def draw(sampler: Drawn, facts: LoaderFacts, generators: list[torch.Generator]) -> tuple[Tensor, list[Tensor]]:
    """Draw one epoch's indices ``(draws,)``, and the generators' states after the sampler was asked once more."""
    # A loader asks its sampler for one index more than there are, or does not, and some samplers draw once more then:
    # torch's RandomSampler does. So it is asked, and the generators are put back.
    source = iter(sampler)
    try:
        # 8 bytes an index: a list of Python's numbers takes some 36 for each.
        indices = array("q", (index.__index__() for index in islice(source, facts.draws)))
        before = [generator.get_state() for generator in generators]
        indices.extend(index.__index__() for index in islice(source, 1))
    except (AttributeError, TypeError) as error:
        raise ConfigurationError(
            [f"mode='prune' needs a sampler of integer dataset indices: {type(sampler).__name__} yields others."]
        ) from error
    draws = torch.frombuffer(indices, dtype=torch.int64) if indices else torch.empty(0, dtype=torch.int64)
    if len(draws) != facts.draws:
        raise ConfigurationError(
            [
                f"{type(sampler).__name__} drew {'more than ' * (len(draws) > facts.draws)}"
                f"{counted(min(len(draws), facts.draws), 'sample')} where its length was {facts.draws}: "
                "mode='prune' needs a sampler whose __len__ is true and stays the same."
            ]
        )
    if len(draws) and not 0 <= int(draws.min()) <= int(draws.max()) < facts.dataset_size:
        raise ConfigurationError(
            [f"{type(sampler).__name__} drew indices outside [0, {facts.dataset_size}), the range of the dataset."]
        )
    after = [generator.get_state() for generator in generators]
    set_states(generators, before, strict=True)
    return draws, after


def set_states(generators: list[torch.Generator], states: list[Tensor], *, strict: bool = False) -> None:
    """Put generators where their ``get_state`` found them: as many as there are of both, or (``strict``) all."""
    for generator, state in zip(generators, states, strict=strict):
        generator.set_state(state)


def loader_generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Find the torch generators of the loader and of its sampler, which a resumed run must continue."""
    owners: list[Any] = [loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    # Wherever they are kept: samplers have no common name for it. One generator may serve the loader and its sampler.
    values = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    return list({id(value): value for value in values if isinstance(value, torch.Generator)}.values())
