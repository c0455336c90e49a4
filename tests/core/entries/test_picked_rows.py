"""Rows that values pick one by one are no blocks of the samples, even where their number is a multiple of the batch size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ast.core import EntryFinder, SampleTrace

B, T, C = 8, 6, 5
EMBED, HEAD = nn.Embedding(20, 4), nn.Linear(4, C)


def by_mask(ids: Tensor, y: Tensor) -> Tensor:
    kept = ids > 0
    return F.cross_entropy(HEAD(EMBED(ids[kept])), y[kept])


def by_positions(ids: Tensor, y: Tensor) -> Tensor:
    positions = (ids > 0).flatten().nonzero().squeeze(1)
    return F.cross_entropy(HEAD(EMBED(ids.flatten()[positions])), y.flatten()[positions])


def by_selection(ids: Tensor, y: Tensor) -> Tensor:
    kept = ids > 0
    return F.cross_entropy(HEAD(EMBED(ids.masked_select(kept))), y.masked_select(kept))


def all_of_them(ids: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(HEAD(EMBED(ids)).view(-1, C), y.flatten())


@pytest.mark.parametrize("step", [by_mask, by_positions, by_selection])
def test_picked_rows_are_unclear(step: object) -> None:
    torch.manual_seed(0)
    ids, y = torch.randint(1, 20, (B, T)), torch.randint(0, C, (B, T))
    ids[:, 3:] = 0  # every sample keeps three: 24 rows
    trace = SampleTrace((ids, y), B)
    with trace:
        loss = step(ids, y)  # type: ignore[operator]
    found = EntryFinder().prove(loss, B, trace)
    assert not found.entries
    assert any(f"({B * 3}, " in text for text in found.unclear)


def test_flattened_rows_are_blocks() -> None:
    torch.manual_seed(0)
    ids, y = torch.randint(1, 20, (B, T)), torch.randint(0, C, (B, T))
    trace = SampleTrace((ids, y), B)
    with trace:
        loss = all_of_them(ids, y)
    (entry,) = EntryFinder().prove(loss, B, trace).entries
    assert (entry.place.pre, entry.place.post) == (1, T)
