"""Batch samplers as users write them, and by hand what a plan leaves of their batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from lightning_ast.core import SampleSelector, plan_epoch
from tests.pruning.prune_by_hand import SIZE, Indexed, Witness, history_by_hand

Batches = list[list[int]]


class Grouped(BatchSampler):
    """As torchvision's reference for detection: full batches of samples of one group, by their aspect ratio."""

    def __init__(self, sampler: Any, group_ids: Any, batch_size: int) -> None:
        super().__init__(sampler, batch_size, False)
        self.group_ids = group_ids

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = defaultdict(list)
        seen: dict[int, list[int]] = defaultdict(list)
        left = len(self)
        for index in self.sampler:
            group = self.group_ids[index]
            waiting[group].append(int(index))
            seen[group].append(int(index))
            if len(waiting[group]) == self.batch_size:
                left -= 1
                yield waiting.pop(group)
        for group in sorted(waiting, key=lambda group: -len(waiting[group]))[:left]:  # filled up with seen ones
            yield (waiting[group] + seen[group] * self.batch_size)[: self.batch_size]

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size


class Lengths(Sampler[Any]):
    """As in speech and text: samples of about one length, in shuffled batches of about as many frames."""

    def __init__(self, frames: int = 120) -> None:
        self.generator = torch.Generator().manual_seed(3)
        batches: Batches = [[]]
        for index in sorted(range(SIZE), key=length_of):
            if (len(batches[-1]) + 1) * length_of(index) > frames:
                batches.append([])
            batches[-1].append(index)
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.batches), generator=self.generator).tolist()
        return (self.batches[number] for number in order)

    def __len__(self) -> int:
        return len(self.batches)


class OwnRandom(Lengths):
    """Shuffles by a generator of Python or numpy that it keeps for itself."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.generator = None
        self.source = source

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.batches)))
        self.source.shuffle(order)
        return (self.batches[number] for number in order)


def length_of(index: int) -> int:
    return 3 + index * 7 % 17


class Classes(Sampler[Any]):
    """As for metric learning: so many samples of each of a few classes, drawn from the global generator."""

    def __init__(self, *, named: bool = False, classes: int = 4, samples: int = 4, batches: int = 12) -> None:
        labels = Indexed().y
        self.of_class = [(labels == label).nonzero().flatten() for label in range(10)]
        self.classes, self.samples, self.batches = classes, samples, batches
        if named:
            self.group_ids = labels.tolist()

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.batches):
            classes = torch.randperm(10)[: self.classes].tolist()
            parts = [
                own[torch.randint(len(own), (self.samples,))] for own in (self.of_class[label] for label in classes)
            ]
            yield torch.cat(parts)

    def __len__(self) -> int:
        return self.batches


class Recorded:
    """Another batch sampler, which keeps the batches that it drew, epoch by epoch."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: list[Batches] = []
        if hasattr(sampler, "group_ids"):
            self.group_ids = sampler.group_ids
        self.generator = getattr(sampler, "generator", None)

    def __iter__(self) -> Iterator[Any]:
        self.drawn.append([])
        for batch in self.sampler:
            self.drawn[-1].append([int(index) for index in batch])
            yield batch

    def __len__(self) -> int:
        return len(self.sampler)


def grouped(**options: Any) -> Grouped:
    by_length = [length_of(index) % 5 for index in range(SIZE)]
    sampler = options.get("sampler") or RandomSampler(range(SIZE), generator=torch.Generator().manual_seed(2))
    return Grouped(sampler, by_length, 16)


MADE = {
    "lengths": Lengths,
    "grouped": grouped,
    "classes": Classes,
    "named classes": lambda: Classes(named=True),
}


def batches_by_hand(
    module: Witness,
    drawn: Batches,
    *,
    epoch: int,
    count: int,
    groups: Any = None,
    refills: bool = False,
    ranks: int = 1,
) -> Batches:
    """Make the batches of a pruned epoch, one sample after the other; those of one rank come after those of another."""
    history = history_by_hand(module, epoch)
    flat = [index for batch in drawn for index in batch]
    scores = history.significance()
    # which of the samples that were drawn: by numbers of their own, for some come twice
    places = {place: index for place, index in enumerate(flat)}
    chosen = chosen_places(module, flat, epoch=epoch, count=count)
    seats = [
        (number, (number * ranks // len(drawn), groups[index]) if groups is not None else number)
        for number, batch in enumerate(drawn)
        for index in batch
    ]
    taken: dict[int, int] = {}
    for group in {group for _, group in seats}:
        free = [seat for seat, (_, own) in enumerate(seats) if own == group]
        comers = [place for place in chosen if seats[place][1] == group]
        for number, place in enumerate(comers):
            taken[free[number if refills else number * len(free) // len(comers)]] = place
    for number, batch in enumerate(drawn):
        own = [seat for seat, (owner, _) in enumerate(seats) if owner == number]
        while (sum(seat in taken for seat in own) < min(2, len(batch))) and (
            not refills or any(seat in taken for seat in own)
        ):
            seat = next(seat for seat in own if seat not in taken)
            left = [p for p in places if p not in taken.values() and seats[p][1] == seats[seat][1]]
            taken[seat] = max(left, key=lambda place: (float(scores[flat[place]]), place))
    made = [
        [flat[taken[seat]] for seat, (owner, _) in enumerate(seats) if owner == number and seat in taken]
        for number in range(len(drawn))
    ]
    if groups is None:  # in the order in which they were drawn
        made = [
            [flat[p] for p in sorted(taken[s] for s, (owner, _) in enumerate(seats) if owner == number and s in taken)]
            for number in range(len(drawn))
        ]
    return [batch for batch in made if batch]


def chosen_places(module: Witness, flat: list[int], *, epoch: int, count: int) -> list[int]:
    """Where the samples of the plan stand among those drawn; the copies of one sample are told apart by their order."""
    history = history_by_hand(module, epoch)
    order = sorted(range(len(flat)), key=lambda place: flat[place])
    significance = history.significance()[torch.tensor([flat[place] for place in order])]
    kept = SampleSelector(weighting="none").plan(significance, count=count, epoch=epoch).indices.tolist()
    places = sorted(order[number] for number in kept)
    planned = plan_epoch(
        history, torch.tensor(flat), epoch=epoch, count=count, selector=SampleSelector(weighting="none")
    )
    assert [flat[place] for place in places] == planned.indices.tolist()
    return places
