"""The user's DataLoader in mode ``prune``: what can be pruned, and a stand-in for its BatchSampler."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.leading import copied_loader, dealt_sampler
from lightning_ast.lightning_internals.random_state import OtherGenerator
from lightning_ast.lightning_internals.resuming import knows_its_place
from lightning_ast.streams import IndexedStream
from lightning_ast.words import counted

__all__ = [
    "Batching",
    "LoaderFacts",
    "draw",
    "faults_of_loader",
    "loader_faults",
    "loader_generators",
    "pruned_loader",
    "set_states",
    "source_of",
]

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


def source_of(loader: DataLoader[Any]) -> tuple[Batching, Any]:
    """Tell who makes the batches of a loader, and what it draws from: indices, or batches of the user's own sampler."""
    batches = _batches_of(loader)
    if batches is None:
        return "ready", loader.sampler
    # torchdata's loader has a BatchSampler of its own, which makes the same batches
    if type(batches) is BatchSampler or type(batches).__module__.startswith(_TORCHDATA):
        return "plain", getattr(batches, "sampler", None)
    return "own", batches


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
        return [_stream_fault(loader)]
    return _sampling_faults(loader, processes)


def _stream_fault(loader: DataLoader[Any]) -> str:
    name = type(loader.dataset).__name__
    found = "mode='prune' has to skip a sample before it is loaded, and a stream has no order that is known: "
    if IndexedStream.fits(loader.dataset):
        return f"{found}{name} has an index: wrap it, IndexedStream(dataset) of lightning_ast.streams."
    return (
        f"{found}where each sample of {name} has a number of its own, put a SampleFilter of lightning_ast.streams in "
        "front of what decodes, and give it to the callback as sample_filter=. Else use mode='partial' or 'subset'."
    )


def _sampling_faults(loader: DataLoader[Any], processes: int) -> list[str]:
    kind = type(loader).__name__
    own_iter = type(loader).__iter__
    batching, source = source_of(loader)
    is_own = batching == "own"
    possible = [
        (
            own_iter is not DataLoader.__iter__ and not own_iter.__module__.startswith(_TORCHDATA),
            f"needs torch's DataLoader.__iter__: {kind} iterates in a way of its own, which may change the order of "
            "the batches",
        ),
        (not getattr(loader, "in_order", True), "needs in_order=True: else the order of the batches is not known"),
        (
            knows_its_place(loader) and knows_its_place(loader.dataset),
            f"restores the place in the epoch itself, and {kind} saves the state of the dataset with its own: save it "
            "in a LightningDataModule and use torch's DataLoader, or take state_dict out of the dataset",
        ),
        (not hasattr(loader.dataset, "__len__"), "needs the number of samples: the dataset has no __len__"),
        (not hasattr(source, "__len__"), f"needs a length: the {'batch ' * is_own}sampler has no __len__"),
        (
            # A batch sampler of the user's own shares the samples out itself, or by the sampler of Lightning's.
            processes > 1 and not is_own and not isinstance(source, DistributedSampler),
            "with several processes needs a DistributedSampler, so that an index means the same sample in all of "
            "them: leave Trainer(use_distributed_sampler=True), or pass one",
        ),
    ]
    return [f"mode='prune' {fault}." for is_wrong, fault in possible if is_wrong]


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
        batching, source = source_of(loader)
        batches = int(min(len(loader), limit))
        size = len(loader.dataset)  # type: ignore[arg-type]
        if batching == "plain":
            sampler = _batches_of(loader)
            return cls(size, len(source), sampler.batch_size, sampler.drop_last, batches)
        # How many samples a batch of the user's own sampler holds is known when it is drawn: until then it counts as
        # one, as a ready batch does.
        return cls(size, batches if batching == "own" else len(source), 1, False, batches, batching)

    def batches_of(self, samples: int) -> int:
        """Count the batches that some samples make, or may make at most where there are several short ones."""
        if self.drop_last:
            return samples // self.batch_size
        return (samples + self.short_ends * (self.batch_size - 1)) // self.batch_size

    @property
    def offered(self) -> int:
        """Count the samples that a dense epoch trains on."""
        return min(self.draws, self.batches * self.batch_size)


_Batches = Callable[[Any, Iterator[Any] | None], Iterator[list[int]]]


def pruned_loader(given: DataLoader[Any], *, batches: _Batches, count: Callable[[], int]) -> DataLoader[Any]:
    """Copy a loader, with other ``batches`` of what it draws from and, where that runs already, of its iterator."""
    name = "sampler" if given.batch_sampler is None else "batch_sampler"
    return copied_loader(given, **{name: _PrunedBatches(given, batches, count)})


class _PrunedBatches(Sampler[Any]):
    """A stand-in for what makes the batches of the user's loader; what it yields is decided elsewhere."""

    def __init__(self, given: DataLoader[Any], batches: _Batches, count: Callable[[], int]) -> None:
        batching, self._source = source_of(given)
        self._is_lazy = type(_batches_of(given)) is BatchSampler
        self._is_ready = batching == "ready"
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


def draw(
    sampler: Any, facts: LoaderFacts, generators: list[Any], *, started: Iterator[Any] | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Draw one epoch from a sampler, or from a batch sampler of the user's own; ``started`` is one that runs already.

    Return the indices ``(n,)``, the sizes ``(batches,)`` of a batch sampler's batches, and the states of the generators
    after the sampler was asked once more. The generators are left where the last index has put them.
    """
    own = facts.batching == "own"
    source = iter(sampler) if started is None else started
    indices = array("q")  # 8 bytes an index: a list of Python's numbers takes some 36 for each
    ends = array("q", [0])
    try:
        if own:
            for batch in islice(source, facts.draws):
                indices.extend(iter(batch))
                ends.append(len(indices))
        else:
            indices.extend(islice(source, facts.draws))
        before = [generator.get_state() for generator in generators]
        # A loader asks its sampler for one index more than there are, or does not, and some samplers draw once more
        # then: torch's RandomSampler does. So it is asked, and the generators are put back.
        has_more = next(source, None) is not None
    except TypeError as error:
        kind = "a batch sampler of lists of" if own else "a sampler of integer"
        raise ConfigurationError(
            f"mode='prune' needs {kind} dataset indices: {type(sampler).__name__} yields others."
        ) from error
    after = [generator.get_state() for generator in generators]
    set_states(generators, before, strict=True)
    drawn = len(ends) - 1 if own else len(indices)
    if drawn < facts.draws or (has_more and not own):  # a limit of the run may leave batches out
        raise ConfigurationError(
            f"{type(sampler).__name__} drew {'more than ' * (drawn == facts.draws)}"
            f"{counted(drawn, 'batch' if own else 'sample')} where its length was {facts.draws}: mode='prune' "
            "needs a sampler whose __len__ is true when an epoch begins."
        )
    draws = torch.frombuffer(indices, dtype=torch.int64) if indices else torch.empty(0, dtype=torch.int64)
    if len(draws) and not 0 <= int(draws.min()) <= int(draws.max()) < facts.dataset_size:
        raise ConfigurationError(
            f"{type(sampler).__name__} drew indices outside [0, {facts.dataset_size}), the range of the dataset."
        )
    return draws, torch.tensor(ends).diff(), after


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
