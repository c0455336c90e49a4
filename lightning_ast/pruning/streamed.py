"""Mode ``prune`` over a stream without an index: a filter in the stream passes the samples of the epoch's plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_ast.errors import ConfigurationError
from lightning_ast.lightning_internals.leading import StandInLoader, copied_loader
from lightning_ast.lightning_internals.resuming import knows_its_place
from lightning_ast.mode_facts import Mode, PruneSteps
from lightning_ast.pruning.epoch import PlannedBatch
from lightning_ast.pruning.epochs import PrunedEpochs
from lightning_ast.pruning.loader import LoaderFacts
from lightning_ast.streams import SampleFilter
from lightning_ast.words import counted

__all__ = ["StreamedEpochs", "filter_faults"]


class StreamedEpochs(PrunedEpochs):
    """Epochs of a stream: the order is the stream's own, and the module tells which samples a batch holds."""

    def __init__(self, *args: Any, sample_filter: SampleFilter, **options: Any) -> None:
        super().__init__(*args, **options)
        self._filter = sample_filter
        self._planner.filters = True
        if self._parts.are_own:  # a process that was forked shares the memory of the others' filters
            sample_filter.unshare()
        self._left = torch.zeros(sample_filter.size, dtype=torch.bool)  # what the running epoch has yet to train on
        self._weights: Tensor | None = None  # by sample; None where all are 1
        self._samples_done = 0  # of the running epoch
        self._has_warned = False

    def detach(self) -> None:
        """Let every sample pass again, and leave the trainer as it was. Safe to call twice."""
        self._filter.allow(None)
        super().detach()

    def _load(self, combined: CombinedLoader) -> CombinedLoader:
        loaded = super()._load(combined)
        if not self._planner.knows_loader:  # a tuner's trial, on the whole stream
            self._filter.allow(None)
        return loaded

    def _faults_of(self, combined: CombinedLoader) -> list[str]:
        return _stream_faults(combined, self._trainer, parted=self._parts.are_own)

    def _facts_of(self, combined: CombinedLoader) -> LoaderFacts:
        loader = combined.flattened[0]
        size = self._filter.size
        # Several processes end an epoch behind the batches that each has for certain: only the last may be short.
        ends = 1 if self._parts.are_own else max(1, loader.num_workers)
        facts = LoaderFacts(size, size, loader.batch_size, loader.drop_last, batches=0, short_ends=ends)
        return replace(facts, batches=facts.batches_of(size))

    def _loader_for(self, combined: CombinedLoader) -> StandInLoader:
        return _StreamedLoader(combined, self)

    @property
    def _batches_ahead(self) -> float:
        # Each worker ends with a short batch of its own: the number is known when the stream ends. Processes need as
        # many each.
        return self.epoch.lengths.batches if self._parts.are_own else math.inf

    def open(self) -> bool:
        """Let the samples of the running epoch pass; False where nothing may be loaded yet."""
        if self._resumes:  # Lightning started the loader before it knew where the run continues
            return False
        epoch = self.epoch
        goes_on = epoch.replays and self._loaded is not None
        if not goes_on:
            epoch.plan = self._planner.plan(epoch, torch.arange(self._filter.size))
        epoch.replays = False  # a loader that is started twice begins the epoch anew
        assert epoch.plan is not None
        self._left.fill_(False)
        self._left[epoch.plan.indices] = True
        if goes_on and self._loaded is not None:
            self._left &= ~self._loaded["trained"]
        left = self._left.nonzero().flatten()
        self._samples_done = epoch.plan.indices.numel() - left.numel()
        self._weights = None
        if epoch.plan.weights is not None:
            self._weights = torch.ones(self._filter.size).index_copy_(0, epoch.plan.indices, epoch.plan.weights)
        self._filter.allow(left)
        return True

    def next_batch(self, batch_size: int, own: Tensor | None) -> PlannedBatch:
        """Return what the plan says of the samples that the module names."""
        epoch = self.epoch
        if own is None:
            raise ConfigurationError(
                "a sample_filter needs the samples of a batch: override SparseLossMixin.sample_indices(batch) to give "
                "their numbers, as the filter's key gives them."
            )
        indices = own.detach().cpu().long()
        self._check(indices)
        self._left[indices] = False
        stands_for = epoch.stands_for(self._samples_done, self._samples_done + len(indices))
        self._samples_done += len(indices)
        epoch.batch += 1
        return PlannedBatch(indices, None if self._weights is None else self._weights[indices], stands_for)

    def _check(self, indices: Tensor) -> None:
        """Refuse a batch that the plan does not hold, or that holds a sample a second time."""
        known = (indices >= 0) & (indices < self._filter.size)
        wrong = indices[~known] if not known.all() else indices[~self._left[indices]]
        if wrong.numel() == 0 and len(set(indices.tolist())) == len(indices):
            return
        found = wrong if wrong.numel() else indices
        raise ConfigurationError(
            f"batch {self.epoch.batch} of epoch {self.epoch.number} holds samples that the epoch does not train "
            f"on, or a second time, such as number {int(found[0])}: every sample must pass the SampleFilter once "
            "an epoch, and sample_indices must return the same number as the filter's key. With several workers "
            "each must read its own part of the stream."
        )

    def finish_batch(self) -> None:
        """Advance schedules; warn where the stream ended without some of the samples."""
        super().finish_batch()
        drops_last = self._planner.facts.drop_last
        if not self._trainer.is_last_batch or self._has_warned or drops_last or self._parts.are_own:
            return
        if missing := int(self._left.sum()):
            self._has_warned = True
            assert self.epoch.plan is not None
            rank_zero_warn(
                f"lightning-ast: the stream of epoch {self.epoch.number} ended without {missing} of "
                f"{counted(self.epoch.plan.indices.numel(), 'planned sample')}: they were dropped behind the filter, "
                f"or SampleFilter(size={self._filter.size}) counts more than the stream has."
            )

    def check_end(self) -> None:
        """Refuse a stream that ends before those of the other processes, which would wait for ever."""
        due = self.epoch.lengths.batches
        if self._parts.are_own and not self._resumes and self.epoch.batch < due:
            raise ConfigurationError(
                f"the stream of process {self._parts.everyone.rank} ended after {counted(self.epoch.batch, 'batch')} "
                f"of epoch {self.epoch.number} where its plan has {due}: samples were dropped behind the filter, or "
                f"SampleFilter(size={self._filter.size}) counts more than the part of this process has."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the epochs, with the samples of the running one that were trained on."""
        trained = torch.zeros_like(self._left)
        if self.epoch.plan is not None:
            trained[self.epoch.plan.indices] = True
        return {**super().state_dict(), "trained": trained & ~self._left}


class _StreamedLoader(StandInLoader):
    """The user's loader, whose filter is set when it starts."""

    def __init__(self, given: CombinedLoader, epochs: StreamedEpochs) -> None:
        super().__init__(given, [copied_loader(given.flattened[0])])
        self._epochs = epochs
        self._resumed: _ResumedStream | None = None

    def __iter__(self) -> _StreamedLoader:
        """Start the loader with the plan of the epoch."""
        is_open = self._epochs.open()
        (own,) = self.flattened
        if not is_open and self._resumed is None:
            self._resumed = _ResumedStream(own.dataset, own.batch_size)
            collate = partial(_collate, own.collate_fn)
            self.flattened = [copied_loader(own, dataset=self._resumed, collate_fn=collate)]
        ahead = 0
        if is_open and self._resumed is not None:
            ahead = self._epochs.epoch.batch % max(1, own.num_workers)
            self._resumed.begin(ahead)
        super().__iter__()
        for _ in range(ahead):
            next(self)
        return self

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration:
            self._epochs.check_end()
            raise


_NOTHING = object()  # in place of a sample, in a batch of nothing


class _ResumedStream(IterableDataset[Any]):
    """The user's stream in the workers of a run that is resumed."""

    # Workers take turns, beginning with the first one. Where the interrupted epoch was at another one's turn, those
    # before it begin with a batch of nothing, which is thrown away: the batches come as they would have.

    _stream: Any
    _batch_size: int
    _ahead: Tensor

    def __init__(self, stream: Any, batch_size: int) -> None:
        ahead = torch.full((1,), -1)  # workers to whom this applies; -1 closes the stream
        ahead.share_memory_()  # type: ignore[no-untyped-call]
        vars(self).update(_stream=stream, _batch_size=batch_size, _ahead=ahead)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        ahead = int(self._ahead)
        if ahead >= 0:
            if worker is not None and worker.id < ahead:
                yield from [_NOTHING] * self._batch_size
            yield from self._stream

    def begin(self, ahead: int) -> None:
        """Open the stream, with so many workers at whose turn the epoch is not."""
        self._ahead.fill_(ahead)

    # A worker_init_fn finds the dataset in its worker and configures it there, such as which part it reads.
    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's stream."""
        if name == "_stream":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._stream, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the user's stream."""
        setattr(self._stream, name, value)


def _collate(own: Callable[[Any], Any], samples: list[Any]) -> Any:
    return None if samples[0] is _NOTHING else own(samples)


def filter_faults(given: object, mode: Mode, steps: PruneSteps) -> list[str]:
    """Find what is wrong with a setting ``sample_filter``, and with those beside it."""
    if given is None:
        return []
    if not isinstance(given, SampleFilter):
        return [f"sample_filter: expected a SampleFilter of lightning_ast.streams or None, got {given!r}."]
    if mode == "prune" and steps == "keep":
        return [
            "prune_steps='keep' needs batches of a size that a stream does not make: use prune_steps='follow' with a "
            "sample_filter, or 'replan' with target_activation_rate."
        ]
    return []


def _stream_faults(combined: CombinedLoader, trainer: pl.Trainer, *, parted: bool) -> list[str]:
    """Find why a stream cannot be pruned by a filter."""
    loader = combined.flattened[0]
    if len(combined.flattened) != 1 or not isinstance(loader, DataLoader):
        return ["a sample_filter needs one training dataloader, a torch DataLoader."]
    interval = getattr(trainer, "val_check_interval", None)  # Lightning has none where it is a time
    needs = [
        (isinstance(loader.dataset, IterableDataset), "an IterableDataset: leave it out for a map-style dataset"),
        (loader.batch_size is not None, "batch_size: with batch_size=None the stream makes the batches"),
        (
            parted or trainer.world_size == 1,
            "own_parts=True with several processes, each with a SampleFilter that numbers the samples of its part",
        ),
        (
            not (parted and loader.drop_last and loader.num_workers > 1),
            "drop_last=False with own_parts=True and several workers, each of which would drop a last batch of its own",
        ),
        (
            not knows_its_place(loader),
            f"torch's DataLoader: {type(loader).__name__} restores its own position when a run is resumed",
        ),
        # overfit_batches changes this limit, too
        (trainer.limit_train_batches == 1.0, "whole epochs: leave limit_train_batches and overfit_batches out"),
        (
            not isinstance(interval, float) or interval == 1.0,
            f"val_check_interval=1.0, or a number of batches: {interval} is a share of a number that is not known",
        ),
    ]
    return [f"a sample_filter needs {need}." for holds, need in needs if not holds]
