"""The user's DataLoader in mode ``prune``: what can be pruned, and a stand-in for its BatchSampler."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, SupportsIndex, TypeAlias

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.leading import copied_loader, dealt_sampler, lend_iterator, same_mode
from lightning_ast.lightning_internals.random_state import OtherGenerator
from lightning_ast.lightning_internals.resuming import knows_its_place
from lightning_ast.streams import IndexedStream
from lightning_ast.words import counted

__all__ = [
    "Batching",
    "Drawn",
    "LoaderFacts",
    "PrunedBatches",
    "PrunedLoader",
    "batching_of",
    "check_range",
    "draw",
    "faults_of_loader",
    "loader_faults",
    "loader_generators",
    "set_states",
    "source_of",
]

Drawn: TypeAlias = Iterable[SupportsIndex]  # a sampler as the user has it: it may yield numbers of numpy or torch

Batching = Literal["plain", "own", "ready"]
"""Who makes the batches: torch's BatchSampler, a batch sampler of the user's own, or the dataset, sample by sample."""

_TORCHDATA = "torchdata.stateful_dataloader"


def _batches_of(loader: DataLoader[Any]) -> Any:
    """Return what puts indices together into batches; None where each index is that of a ready batch."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    # With batch_size=None it may be the sampler, for a dataset that loads several samples at once.
    samplers = (loader.sampler, dealt_sampler(loader.sampler))
    return loader.sampler if any(isinstance(sampler, BatchSampler) for sampler in samplers) else None


def batching_of(loader: DataLoader[Any]) -> Batching:
    """Tell who makes the batches of a loader."""
    batches = _batches_of(loader)
    if batches is None:
        return "ready"
    # torchdata's loader has a BatchSampler of its own, which makes the same batches
    is_plain = type(batches) is BatchSampler or type(batches).__module__.startswith(_TORCHDATA)
    return "plain" if is_plain else "own"


def source_of(loader: DataLoader[Any]) -> Any:
    """Return what the user's loader draws from: indices, or whole batches of them from a batch sampler of their own."""
    batches = _batches_of(loader)
    if batches is None:
        return loader.sampler
    return getattr(batches, "sampler", None) if batching_of(loader) == "plain" else batches


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
    batching = batching_of(loader)
    source = source_of(loader)
    own = type(loader).__iter__
    if own is not DataLoader.__iter__ and not own.__module__.startswith(_TORCHDATA):
        found.append(
            f"{type(loader).__name__} iterates in a way of its own, which may change the order of the batches: "
            "mode='prune' needs torch's DataLoader.__iter__."
        )
    if not getattr(loader, "in_order", True):
        found.append("mode='prune' needs in_order=True: else batches arrive in an order that nobody knows.")
    if knows_its_place(loader) and knows_its_place(loader.dataset):
        found.append(
            f"{type(loader).__name__} saves the state of the dataset with its own, and mode='prune', which restores "
            "the place in the epoch itself, does not: save it in a LightningDataModule and use torch's DataLoader, or "
            "take state_dict out of the dataset."
        )
    named = "batch sampler" if batching == "own" else "sampler"
    for name, part in (("dataset", loader.dataset), (named, source)):
        if not hasattr(part, "__len__"):
            found.append(f"mode='prune' needs to know how many samples there are: the {name} has no __len__.")
    # A batch sampler of the user's own shares the samples out itself, or by the sampler that Lightning gives it.
    if processes > 1 and batching != "own" and not isinstance(source, DistributedSampler):
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
    batching: Batching = "plain"
    short_ends: int = 1  # batches that may be short: each worker of a stream ends with one of its own

    @classmethod
    def of(cls, combined: CombinedLoader) -> LoaderFacts:
        """Read the lengths from a single loader without faults; with ready batches each counts as one sample."""
        return cls.of_loader(combined.flattened[0], *(combined.limits or ()))

    @classmethod
    def of_loader(cls, loader: DataLoader[Any], limit: float = math.inf) -> LoaderFacts:
        """Read the lengths from one of several loaders; a limit of the run leaves some batches out."""
        batching = batching_of(loader)
        batches = int(min(len(loader), limit))
        size = len(loader.dataset)  # type: ignore[arg-type]
        if batching == "own":  # how many samples a batch holds is known when it is drawn: until then it counts as one
            return cls(size, batches, 1, False, batches, batching)
        draws = len(source_of(loader))
        if batching == "ready":
            return cls(size, draws, 1, False, batches, batching)
        sampler = _batches_of(loader)
        return cls(size, draws, sampler.batch_size, sampler.drop_last, batches)

    def batches_of(self, samples: int) -> int:
        """Count the batches that some samples make, or may make at most where there are several short ones."""
        if self.drop_last:
            return samples // self.batch_size
        return (samples + self.short_ends * (self.batch_size - 1)) // self.batch_size

    @property
    def offered(self) -> int:
        """Count the samples that a dense epoch trains on."""
        return min(self.draws, self.batches * self.batch_size)


class PrunedBatches(Sampler[Any]):
    """A stand-in for what makes the batches of the user's loader; what it yields is decided elsewhere."""

    def __init__(
        self,
        given: DataLoader[Any],
        *,
        batches: Callable[[Any, Iterator[Any] | None], Iterator[list[int]]],
        count: Callable[[], int],
    ) -> None:
        self._source = source_of(given)
        self._is_lazy = type(_batches_of(given)) is BatchSampler
        self._is_ready = batching_of(given) == "ready"
        self._batches = batches
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        # torch's BatchSampler starts its sampler when it is asked for the first batch. Others may draw when they are
        # started, and a loader with workers starts them twice: the generators are to be where the plain run has them.
        started = None if self._is_lazy else iter(self._source)
        batches = self._batches(self._source, started)
        return (batch[0] for batch in batches) if self._is_ready else batches

    def __len__(self) -> int:
        return self._count()


class PrunedLoader(CombinedLoader):
    """The user's loader with another sampler under its batches; theirs is left alone, with all that it holds."""

    def __init__(self, given: CombinedLoader, make: Callable[[int, DataLoader[Any]], PrunedBatches]) -> None:
        # `trainer.train_dataloader` gives what is passed here: the user's own loader.
        super().__init__(given.iterables, same_mode(given))
        self.given = given
        self.flattened = [
            copied_loader(
                loader, **{"sampler" if loader.batch_sampler is None else "batch_sampler": make(number, loader)}
            )
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


def draw(
    sampler: Drawn, facts: LoaderFacts, generators: list[Any], *, started: Iterator[Any] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Draw one epoch's indices ``(draws,)``, and the generators' states after the sampler was asked once more.

    ``started`` is the sampler's iterator where it runs already.
    """
    # A loader asks its sampler for one index more than there are, or does not, and some samplers draw once more then:
    # torch's RandomSampler does. So it is asked, and the generators are put back.
    source = iter(sampler) if started is None else started
    try:
        # 8 bytes an index: a list of Python's numbers takes some 36 for each.
        indices = array("q", islice(source, facts.draws))
        before = [generator.get_state() for generator in generators]
        indices.extend(islice(source, 1))
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
    check_range(draws, sampler, facts)
    after = [generator.get_state() for generator in generators]
    set_states(generators, before, strict=True)
    return draws, after


def check_range(draws: Tensor, sampler: object, facts: LoaderFacts) -> None:
    """Refuse indices that the dataset does not have."""
    if len(draws) and not 0 <= int(draws.min()) <= int(draws.max()) < facts.dataset_size:
        raise ConfigurationError(
            [f"{type(sampler).__name__} drew indices outside [0, {facts.dataset_size}), the range of the dataset."]
        )


def set_states(generators: list[Any], states: list[Tensor], *, strict: bool = False) -> None:
    """Put generators where their ``get_state`` found them: as many as there are of both, or (``strict``) all."""
    for generator, state in zip(generators, states, strict=strict):
        generator.set_state(state)


def loader_generators(loader: DataLoader[Any]) -> list[Any]:
    """Find the generators of the loader and of its samplers, which a resumed run must continue; torch's come first."""
    batches = _batches_of(loader)
    owners: list[Any] = [loader, loader.sampler, getattr(batches, "sampler", None), batches]
    found: dict[int, Any] = {}  # one generator may serve the loader and its sampler
    others: dict[int, OtherGenerator] = {}
    # Wherever they are kept: samplers have no common name for it, nor for a sampler that they draw from.
    for owner in owners:
        values = [*getattr(owner, "__dict__", {}).values(), dealt_sampler(owner)]
        found |= {id(value): value for value in values if isinstance(value, torch.Generator)}
        others |= {id(value): OtherGenerator(value) for value in values if OtherGenerator.wraps(value)}
        owners += [value for value in values if isinstance(value, Sampler) and not any(value is own for own in owners)]
    return [*found.values(), *others.values()]
