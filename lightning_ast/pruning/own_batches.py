"""Batches that a sampler of the user's own makes, or the dataset, and what a plan leaves of them.

A batch sampler puts samples together by a rule that nothing outside can know. So its batches are taken as they are
drawn, and only what the plan left out is missing from them. Where the sampler tells the group of each sample, samples
of one group may take each other's places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ast.core.history import EpochPlan, SignificanceHistory, plan_positions
from lightning_ast.core.selector import SampleSelector
from lightning_ast.errors import ConfigurationError
from lightning_ast.words import counted

__all__ = ["DrawnBatches", "plan_batches", "sample_groups"]

_LEAST = 2  # samples in a batch of a pruned epoch: BatchNorm cannot train on one


@dataclass(frozen=True)
class DrawnBatches:
    """The batches of an epoch that the batch samplers of all processes drew."""

    indices: Tensor  # (n,) dataset indices, batch by batch, of one process after the other
    sizes: Tensor  # (processes, batches) samples in each

    @classmethod
    def joined(cls, parts: list[tuple[Tensor, Tensor]]) -> DrawnBatches:
        """Join what each process drew: the indices, and the sizes of its batches."""
        lengths = [sizes.numel() for _, sizes in parts]
        if len(set(lengths)) > 1:
            raise ConfigurationError(
                f"the batch samplers of the processes drew {lengths} batches, by rank: mode='prune' needs as many "
                "in each process, as DDP does. Let the batch sampler leave out or repeat a batch."
            )
        first = parts[0][0]
        if len(parts) > 1 and len(first) and all(torch.equal(first, indices) for indices, _ in parts):
            raise ConfigurationError(
                "the batch samplers of all processes drew the same samples: let each draw its own part, by a "
                "DistributedSampler under the batch sampler or by its rank."
            )
        return cls(torch.cat([indices for indices, _ in parts]), torch.stack([sizes for _, sizes in parts]))


def sample_groups(sampler: object, dataset_size: int) -> Tensor | None:
    """Number the groups of the dataset's samples ``(N,)`` by the sampler's ``group_ids``; None where it has none."""
    ids: Any = getattr(sampler, "group_ids", None)
    if ids is None:
        return None
    if len(ids) != dataset_size:
        raise ConfigurationError(
            f"{type(sampler).__name__}.group_ids names the groups of {counted(len(ids), 'sample')}, and the "
            f"dataset has {dataset_size}: it must hold the group of each sample, by its index in the dataset."
        )
    numbers: dict[Any, int] = {}
    names = ids.tolist() if isinstance(ids, Tensor) else ids
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names])


def plan_batches(
    history: SignificanceHistory,
    drawn: DrawnBatches,
    groups: Tensor | None,
    *,
    epoch: int,
    count: int,
    selector: SampleSelector,
    refills: bool,
    most: Callable[[int], int] = int,
) -> tuple[EpochPlan, Tensor]:
    """Choose ``count`` samples of an epoch, and put them into the batches that were drawn; tell the sizes of these.

    A sample may take the place of another one of its process and its group, of which ``groups (N,)`` tells; without
    groups it stays in its batch. With ``refills`` the first batches are filled up and the last ones left out, else
    every batch is kept, with its share of the samples. A batch that would be left with one gets another one back.
    ``most`` takes the largest of a number over processes that plan by themselves.
    """
    offered = drawn.indices.numel()
    kept, weights = plan_positions(history, drawn.indices, epoch=epoch, count=count, selector=selector)
    owner = torch.arange(drawn.sizes.numel()).repeat_interleave(drawn.sizes.flatten())  # the batch of each place
    process = owner // max(1, drawn.sizes.shape[1])
    kind = owner if groups is None else process * (int(groups.max()) + 1) + groups[drawn.indices]
    seats = _seated(kept, kind, refills=refills)
    sizes = owner[seats >= 0].bincount(minlength=drawn.sizes.numel()).view_as(drawn.sizes)
    opened = _opened(sizes, drawn.sizes, most) if refills else torch.ones_like(sizes, dtype=torch.bool)
    short = (opened & (sizes < drawn.sizes.clamp(max=_LEAST))).flatten()
    significance = history.significance(trim=selector.trim).masked_fill(history.withheld, -1.0)[drawn.indices]
    _bring_back(seats, short[owner], owner, kind, significance)
    taken = seats >= 0
    planned = owner[taken].bincount(minlength=drawn.sizes.numel())
    # Samples that stay in their batch stay in its order, too.
    positions = seats[taken].sort().values if groups is None else seats[taken]
    if weights is not None:
        full = torch.ones(offered, dtype=weights.dtype).index_put_((kept,), weights)
        # The mean over a batch is to estimate that over the batch as it was drawn; a batch that is filled up stands for
        # the others that are left out.
        share = len(positions) / offered if refills else (planned / drawn.sizes.flatten())[owner[taken]]
        weights = (full[positions] * share).float()
    left = planned.view_as(drawn.sizes)[opened].view(len(drawn.sizes), -1)
    return EpochPlan(epoch, drawn.indices[positions], offered, weights), left


def _seated(kept: Tensor, kind: Tensor, *, refills: bool) -> Tensor:
    """Give each kept position a place among those of its kind: ``(n,)`` the position that has each place, or -1."""
    order = kind.argsort(stable=True)
    held = kind[order].bincount()
    begin = held.cumsum(0) - held
    chosen = torch.zeros(len(kind), dtype=torch.bool)
    chosen[kept] = True
    comers = order[chosen[order]]  # the kept ones, kind by kind, in the order of the draws
    kinds = kind[comers]
    came = kinds.bincount(minlength=len(held))
    rank = torch.arange(len(comers)) - (came.cumsum(0) - came)[kinds]
    place = rank if refills else rank * held[kinds] // came[kinds]  # at the front, or spread evenly
    seats = torch.full_like(kind, -1)
    seats[order[begin[kinds] + place]] = comers
    return seats


def _opened(sizes: Tensor, drawn: Tensor, agree: Callable[[int], int]) -> Tensor:
    """Tell which batches an epoch has: those with samples, and in each process as many as in the one with the most."""
    opened = sizes > 0
    most = agree(int(opened.sum(1).max()))
    for own, full in zip(opened, drawn, strict=True):
        empty = (~own & (full > 0)).nonzero().squeeze(1)
        own[empty[: most - int(own.sum())]] = True
    return opened


def _bring_back(seats: Tensor, short: Tensor, owner: Tensor, kind: Tensor, significance: Tensor) -> None:
    """Fill batches that are too short with the most significant of the samples left out that may stand there.

    Those of a significance below 0 are withheld: they come back where a batch would be empty, and not for company.
    """
    if not short.any():
        return
    left_out = torch.ones(len(seats), dtype=torch.bool)
    left_out[seats[seats >= 0]] = False
    waiting: dict[int, list[int]] = {}
    of_interest = torch.isin(kind, kind[short]) & left_out
    candidates = of_interest.nonzero().squeeze(1)
    ranked = candidates[significance[candidates].argsort(stable=True)]  # the most significant last: it is taken first
    for position, own in zip(ranked.tolist(), kind[ranked].tolist(), strict=True):
        waiting.setdefault(own, []).append(position)
    sizes = owner[seats >= 0].bincount(minlength=int(owner[-1]) + 1).tolist()
    places = (short & (seats < 0)).nonzero().squeeze(1)
    for place, batch, own in zip(places.tolist(), owner[places].tolist(), kind[places].tolist(), strict=True):
        # a kind has as many samples left out as places left free
        if sizes[batch] == 0 or (sizes[batch] < _LEAST and significance[waiting[own][-1]] >= 0):
            seats[place] = waiting[own].pop()
            sizes[batch] += 1
